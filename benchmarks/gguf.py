"""A student as llama.cpp reads it: its tokens, and what it thinks comes next, beside those of the exported directory.

    python -m benchmarks.gguf --run DIR [--documents N] [--json FILE]

Needs ``pip install gguf xllamacpp``, the second a binding of llama.cpp that comes built. README.md defines every key.
"""

from __future__ import annotations

import http.client
import json
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks import command, machine
from daramgpt.errors import UserError
from daramgpt.run_directory import RunDirectory

PROMPT_CHARACTERS, LIKELIEST = 60, 5
# What a tokenizer is apt to treat in a way of its own.
ODD_TEXTS = (
    *("안녕 😀 𠀀 \t탭  두 칸", "끝 공백 ", "줄\n바꿈\n\n둘", "</s> 글자 그대로 <unk>", "<0x41>", "a"),
    *("ㄱㄴㄷ ①②③ 漢字", "  앞 공백", "▁밑줄"),
)


def measure(run: RunDirectory, num_documents: int) -> dict[str, Any]:
    """The result without hardware and versions.

    Args:
        run: prepared and exported.
        num_documents: of the held-out text of each stage.

    Raises:
        UserError: the run has no export or no held-out text, or a library is missing.
    """
    try:
        import gguf  # noqa: F401
        import xllamacpp  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed", "python -m pip install gguf xllamacpp") from None
    from daramgpt.evaluation.other_tokenizer import OwnTokenizer
    from daramgpt.gguf_export import TYPES, export
    from daramgpt.shards import Shards

    if not (run.export / "config.json").is_file() or not (run.shards / "index.json").is_file():
        raise UserError(f"{run.path} has no shards and no export", "give the folder of a run that is done")
    shards = Shards(run.shards)
    found = [text for stage in shards.stages for text in (shards.heldout_texts(stage.name) or [])[:num_documents]]
    if not found:
        raise UserError(f"{run.shards} keeps no held-out text", "prepare the run again")
    texts, tokenizer = [*found, *ODD_TEXTS], OwnTokenizer(run.export)
    own_tokens = [tokenizer.encode(text) for text in texts]
    prompts = [text[:PROMPT_CHARACTERS] for text in found]
    own_next = _next_by_transformers(run.export, [tokenizer.encode(prompt) for prompt in prompts])
    rows = []
    with tempfile.TemporaryDirectory(prefix="daramgpt-gguf-") as scratch:
        # Written beside a link, for the user's run is to stay as it is.
        copied = RunDirectory(Path(scratch))
        copied.export.symlink_to(run.export.resolve(), target_is_directory=True)
        for weight_type in TYPES:
            path = export(copied, weight_type, command.progress)
            answers = _LlamaCpp(path)
            tokens = [answers.tokens(text) for text in texts]
            rows.append(
                {
                    "name": weight_type,
                    "bytes": path.stat().st_size,
                    **_agreement([answers.likeliest(prompt) for prompt in prompts], own_next),
                }
            )
    is_different = [ours != theirs for ours, theirs in zip(own_tokens, tokens, strict=True)]
    return {
        "texts": len(texts),
        "tokens": sum(map(len, own_tokens)),
        "texts_with_other_tokens": [text[:40] for text, other in zip(texts, is_different, strict=True) if other],
        "prompts": len(prompts),
        "safetensors_bytes": (run.export / "model.safetensors").stat().st_size,
        "rows": rows,
    }


class _LlamaCpp:
    """llama.cpp's server on a file, asked over its own port of this machine."""

    def __init__(self, path: Path) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path, settings.n_ctx, settings.n_parallel = str(path), 512, 1
        self._server = xllamacpp.Server(settings)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self._server.listening_address}{path}", data, kind)
        answer: http.client.HTTPResponse
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def tokens(self, text: str) -> list[int]:
        """Of a text, whatever is written in it."""
        found: list[int] = self._post("/tokenize", {"content": text, "add_special": True})["tokens"]
        return found

    def likeliest(self, prompt: str) -> dict[int, float]:
        """Log-probabilities of the likeliest next tokens, by id, the likeliest first."""
        asked = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": LIKELIEST, "cache_prompt": False}
        (first,) = self._post("/completion", asked)["completion_probabilities"]
        return {one["id"]: one["logprob"] for one in first["top_logprobs"]}


def _next_by_transformers(model_dir: Path, prompts: list[list[int]]) -> list[Any]:
    """Log-probabilities [V] of what follows each prompt."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], -1) for ids in prompts]


def _agreement(theirs: list[dict[int, float]], own: list[Any]) -> dict[str, float]:
    pairs = list(zip(theirs, own, strict=True))
    gaps = [abs(value - float(log_V[token])) for found, log_V in pairs for token, value in found.items()]
    return {
        "same_likeliest": sum(next(iter(found)) == int(log_V.argmax()) for found, log_V in pairs) / len(pairs),
        "largest_gap_nats": max(gaps),
        "mean_gap_nats": sum(gaps) / len(gaps),
    }


def format_result(result: dict[str, Any]) -> str:
    """The table and what stands below it."""
    rows = [
        (
            row["name"],
            f"{row['bytes'] / 1e6:,.1f}",
            f"{row['same_likeliest']:.1%}",
            f"{row['mean_gap_nats']:.5f}",
            f"{row['largest_gap_nats']:.5f}",
        )
        for row in result["rows"]
    ]
    other = result["texts_with_other_tokens"]
    return "\n".join(
        (
            machine.format_table(("", "MB", "same likeliest", "mean gap", "largest gap"), rows),
            f"gaps in nats, of the {LIKELIEST} likeliest tokens after {result['prompts']:,} prompts; model.safetensors "
            f"has {result['safetensors_bytes'] / 1e6:,.1f} MB",
            f"the same tokens in {result['texts'] - len(other):,} of {result['texts']:,} texts of "
            f"{result['tokens']:,} tokens",
            *(f"other tokens: {text!r}" for text in other),
        )
    )


def main() -> int:
    """Measure, print, write."""
    parser = command.parser("gguf", __doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of a run that is done")
    parser.add_argument("--documents", type=int, default=20, help="of the held-out text of each stage")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    run = RunDirectory(arguments.run)
    return command.run(lambda: measure(run, arguments.documents), format_result, arguments.json, "gguf")


if __name__ == "__main__":
    sys.exit(main())
