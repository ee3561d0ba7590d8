from daramgpt.cli import main

main()
