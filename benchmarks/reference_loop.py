"""The reference loop: the training loop of the 2023 article that this project is measured against, faults included.

fp32, batch 16, one sentence a row, padded to the longest of the batch; teacher and student are plain
``GPT2LMHeadModel``, and the logits of both exist whole. It keeps what the article's loop does wrong, because each is
part of what a step costs or computes: ``KLDivLoss(reduction="batchmean")`` over [B, T, V] divides by B only, padding
takes part in the KL, and ``optimizer.step()`` is called once more after ``zero_grad``. What has become faster since,
inside the libraries, it gets like everyone else (attention by SDPA, the same allocator, the same threads).
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

BATCH_SENTENCES = 16
TEMPERATURE = 2.0
CE_WEIGHT = 0.1


class PaddedSentences(Dataset[list[int]]):
    """A stream of token ids cut into sentences of given lengths.

    Args:
        token_ids: [num_tokens] int64; read again from the start when the lengths ask for more.
        lengths: tokens a sentence.
    """

    def __init__(self, token_ids: Tensor, lengths: list[int]) -> None:
        assert max(lengths) <= len(token_ids), "a sentence longer than the text"
        self._token_ids, self._spans, position = token_ids, list[tuple[int, int]](), 0
        for length in lengths:
            if position + length > len(token_ids):
                position = 0
            self._spans.append((position, position + length))
            position += length

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> list[int]:
        start, end = self._spans[index]
        return self._token_ids[start:end].tolist()


def pad(sentences: list[list[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask [B, longest]."""
    longest = max(map(len, sentences))
    input_ids = torch.tensor([sentence + [pad_token_id] * (longest - len(sentence)) for sentence in sentences])
    mask = torch.tensor([[1] * len(sentence) + [0] * (longest - len(sentence)) for sentence in sentences])
    return input_ids, mask


def batches(sentences: PaddedSentences, pad_token_id: int) -> DataLoader[tuple[Tensor, Tensor]]:
    """Batches of 16 in order, as the article's DataLoader gives them."""
    return DataLoader(
        sentences,  # type: ignore[arg-type]
        batch_size=BATCH_SENTENCES,
        drop_last=True,
        collate_fn=lambda batch: pad(batch, pad_token_id),
    )


class ReferenceLoop:
    """Both models and the optimizer.

    Args:
        teacher_dir: Hugging Face directory.
        student: fp32.
        device: of both.
    """

    def __init__(self, teacher_dir: Path, student: GPT2LMHeadModel, device: torch.device) -> None:
        self.device = device
        teacher = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float32)
        self.teacher, self.student = cast(Module, teacher), cast(Module, student)
        self.teacher.to(device).eval()
        self.student.to(device).train()
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=5e-5)
        self.divergence = torch.nn.KLDivLoss(reduction="batchmean")

    def step(self, input_ids: Tensor, attention_mask: Tensor) -> float:
        """One training step on a padded batch; the loss."""
        input_ids, attention_mask = input_ids.to(self.device), attention_mask.to(self.device)
        labels = input_ids.masked_fill(attention_mask == 0, -100)
        output = self.student(input_ids, attention_mask=attention_mask, labels=labels)
        with torch.no_grad():
            teacher_logits = self.teacher(input_ids, attention_mask=attention_mask).logits
        divergence = self.divergence(
            torch.log_softmax(output.logits / TEMPERATURE, dim=-1), torch.softmax(teacher_logits / TEMPERATURE, dim=-1)
        )
        loss = TEMPERATURE**2 * divergence + CE_WEIGHT * output.loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.optimizer.step()
        return loss.item()
