"""Train the embedded model, tokenizer and weights, on the generated corpus only.

python -m scripts.tiny.pretrain
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scripts.tiny.corpus import documents

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
# A space belongs to the word before it, so that a word has the same tokens at the start of a line
# or an answer. With the space in front, an answer at the start of a line has other tokens than the
# base has learned: fine-tuning such a base scored 0.28, and 0.68 with a leading space added to the
# answers.
WORD = r"\p{L}+ ?|\p{N}+ ?|[^\s\p{L}\p{N}]+ ?|\s+"
# Content starts on its own line, so that a prompt and its answer have the same tokens whether they
# are tokenised together or separately.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'assistant' %}
{{- 'Assistant:\\n' }}
{%- generation %}
{{- message['content'] + eos_token }}
{%- endgeneration %}
{%- elif message['role'] in ['system', 'user'] %}
{{- message['role'].capitalize() + ':\\n' + message['content'] + '\\n' }}
{%- else %}
{{- raise_exception('unknown role: ' + message['role']) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- 'Assistant:\\n' }}
{%- endif %}
"""


def main() -> None:
    args = _arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    tokenizer = build_tokenizer(args.seed, args.vocab_size, args.tokenizer_documents)
    model = build_model(tokenizer)
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}")

    # Each use of the stream has its own seed, so no measured text was trained on.
    train_rows = rows(tokenizer, args.seed + 1, args.row_tokens)
    held_out_rows = rows(tokenizer, args.seed + 2, args.row_tokens)
    started = time.monotonic()
    train(model, train_rows, args.steps, args.batch_rows, args.lr, args.muon_lr)
    loss = held_out_loss(model, held_out_rows)
    print(f"held-out loss {loss:.4f} after {time.monotonic() - started:.0f} s")

    save(model, tokenizer, args.out)
    digest = hashlib.sha256((args.out / "model.safetensors").read_bytes()).hexdigest()
    print(f"{digest}  {args.out / 'model.safetensors'}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--batch-rows", type=int, default=8)
    parser.add_argument("--row-tokens", type=int, default=128)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--tokenizer-documents", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("raytune_ft/model/tiny"))
    return parser.parse_args()


def build_tokenizer(seed: int, vocab_size: int, n_documents: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the corpus; it has all 256 bytes, so it can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(documents(seed), n_documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def rows(tokenizer: PreTrainedTokenizerFast, seed: int, row_tokens: int) -> Iterator[list[int]]:
    """Documents joined, each between `<s>` and `</s>`, cut into rows of equal length."""
    buffer: list[int] = []
    for document in documents(seed):
        buffer += [*tokenizer.encode(document), tokenizer.eos_token_id]
        while len(buffer) >= row_tokens:
            yield buffer[:row_tokens]
            buffer = buffer[row_tokens:]


def train(
    model: LlamaForCausalLM,
    stream: Iterator[list[int]],
    steps: int,
    batch_rows: int,
    lr: float,
    muon_lr: float,
) -> None:
    optimizers = build_optimizers(model, lr, muon_lr)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, steps))
        for optimizer in optimizers
    ]
    started, recent = time.monotonic(), 0.0
    model.train()
    for step in range(1, steps + 1):
        tokens_BS = torch.tensor(list(islice(stream, batch_rows)))
        loss = model(input_ids=tokens_BS, labels=tokens_BS).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        recent = loss.item() if step == 1 else 0.95 * recent + 0.05 * loss.item()
        if step % 100 == 0 or step == steps:
            print(f"step {step} loss {recent:.4f} {time.monotonic() - started:.0f} s", flush=True)


def build_optimizers(
    model: LlamaForCausalLM, lr: float, muon_lr: float
) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms.

    After 250 steps of 16 rows the held-out loss was 1.49, and 2.17 with AdamW alone; a step took
    4 % longer.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    of_muon = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in of_muon]
    return [
        torch.optim.AdamW(others, lr, betas=(0.9, 0.95), weight_decay=0.01),
        torch.optim.Muon(matrices, muon_lr, weight_decay=0.01),
    ]


def lr_factor(step: int, steps: int) -> float:
    """Linear warmup over the first twentieth, then a cosine to zero."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: Iterator[list[int]]) -> float:
    model.eval()
    tokens_BS = torch.tensor(list(islice(stream, 64)))
    return model(input_ids=tokens_BS, labels=tokens_BS).loss.item()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    model.generation_config.do_sample = False
    model.save_pretrained(out)
    # The chat template goes into tokenizer_config.json, which saves one file in the package.
    tokenizer.save_pretrained(out, save_jinja_files=False)
    for path in out.iterdir():
        path.chmod(0o644)


if __name__ == "__main__":
    main()
