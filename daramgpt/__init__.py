"""DaramGPT: distil a large Korean GPT into a small one on hardware people get for free."""

__version__ = "0.1.0"
