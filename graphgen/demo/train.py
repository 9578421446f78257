"""Makes the embedded demo model: a small Llama trained on Shakespeare, in the Hugging Face layout.

Owns the split of the text, the tokenizer, the shape of the model, the training loop and the export. It never
runs while graphgen serves: a person calls it (`python -m graphgen.demo.train --out DIR`), and the tests reuse
its split and its measure of the loss. CUDA trains in bfloat16 autocast within minutes; the CPU works, slowly.

The text is one megabyte, so a model of four million weights learns it by heart within a few dozen passes.
Against that stand dropout on the embedding and on every residual branch, weight decay, a running average of
the weights, and early stopping on the validation loss; the best average seen is what is exported.
"""

import argparse
import copy
import json
import math
import platform
import shlex
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from graphgen.demo import play_file

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 1024
CONTEXT_LEN = 1024  # max_position_embeddings: every position up to it is trained at the default --seq-len
EVAL_BATCH_TOKENS = 16 * 1024


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result of a training run, each one an option of the command line."""

    steps: int = 2000
    batch_size: int = 16  # windows a step
    seq_len: int = CONTEXT_LEN  # tokens a window
    lr: float = 2e-3
    warmup: int = 100  # steps of linear warm-up; a cosine to a twentieth of lr follows
    dropout: float = 0.25
    weight_decay: float = 0.2
    eval_every: int = 100  # steps
    patience: int = 6  # evaluations without a better validation loss before training ends
    seed: int = 0


class Loss(NamedTuple):
    """Mean negative log-likelihood in nats; the two differ by the characters that a token stands for."""

    nats_per_token: float
    nats_per_character: float


# --- text and tokens ---------------------------------------------------------------------------------------


def split_play(text: str) -> tuple[str, str]:
    """The first 90 % of the characters to train on, the last 10 % to validate."""
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def train_tokenizer(text: str) -> Tokenizer:
    """Byte-level BPE: all 256 bytes are in the vocabulary, so that every string has an encoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, text: str, device: torch.device) -> Tensor:
    """Token ids of `text`, int64 `[tokens]`."""
    return torch.tensor(tokenizer.encode(text).ids, device=device)


# --- the model ---------------------------------------------------------------------------------------------


def new_model(dropout: float) -> LlamaForCausalLM:
    """Four million random weights. Heads are 64 wide, the smallest size that all attention kernels serve."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT_LEN,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    # Llama has no residual dropout of its own. Hooks add it without a change to the exported weights.
    layers = model.model.layers
    for module in [
        model.model.embed_tokens,
        *(layer.self_attn.o_proj for layer in layers),
        *(layer.mlp.down_proj for layer in layers),
    ]:
        module.register_forward_hook(lambda module, _args, output: functional.dropout(output, dropout, module.training))
    return model


def next_token_loss(model: nn.Module, windows: Tensor, reduction: str = "mean") -> Tensor:
    """Cross entropy, in nats, of every token of `windows` `[windows, tokens]` but each row's first."""
    logits: Tensor = model(input_ids=windows[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten(), reduction=reduction)


def validation_windows(ids: Tensor, seq_len: int) -> Tensor:
    """`ids` cut into rows of `seq_len` + 1 that share one token, so that no token is predicted twice.

    The tokens of the last, incomplete row are left out.
    """
    return ids.unfold(0, seq_len + 1, seq_len)


@torch.inference_mode()
def evaluate(model: nn.Module, windows: Tensor, tokenizer: Tokenizer) -> Loss:
    """Mean loss over the predicted tokens of `windows`, without dropout and in float32."""
    was_training = model.training
    model.eval()
    rows = max(1, EVAL_BATCH_TOKENS // windows.shape[1])
    nats = 0.0
    for first in range(0, len(windows), rows):
        nats += next_token_loss(model, windows[first : first + rows], "sum").item()
    model.train(was_training)
    num_characters = sum(len(tokenizer.decode(row[1:].tolist())) for row in windows)
    return Loss(nats / windows[:, 1:].numel(), nats / num_characters)


# --- training ----------------------------------------------------------------------------------------------


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine down to a twentieth of the peak."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def new_optimizer(model: nn.Module, settings: Settings, device: torch.device) -> torch.optim.AdamW:
    """AdamW that decays the matrices and leaves the norms alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.99), fused=device.type == "cuda")


def random_windows(ids: Tensor, settings: Settings, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches `[batch_size, seq_len + 1]` from random places of `ids`."""
    offsets = torch.arange(settings.seq_len + 1, device=ids.device)
    while True:
        starts = torch.randint(len(ids) - settings.seq_len, (settings.batch_size, 1), generator=generator)
        yield ids[starts.to(ids.device) + offsets]


def autocast(device: torch.device) -> AbstractContextManager[Any]:  # Any: what autocast enters is unused
    """bfloat16 matrix products on CUDA; plain float32 on the CPU, where bfloat16 is mostly slower."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def train_step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, windows: Tensor, lr: float) -> Tensor:
    """One update of the weights; returns the loss as a scalar that is still on its device."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    with autocast(windows.device):
        loss = next_token_loss(model, windows)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def train(
    train_ids: Tensor, valid_ids: Tensor, tokenizer: Tokenizer, settings: Settings
) -> tuple[LlamaForCausalLM, int, int]:
    """Trains a new model.

    Returns the best running average of its weights, the step that average is from, and the steps run.
    """
    device = train_ids.device
    torch.manual_seed(settings.seed)
    model = new_model(settings.dropout).to(device).train()
    # The average looks back over a twentieth of the run: long enough to smooth, short enough not to lag.
    ema = get_ema_multi_avg_fn(max(0.0, 1 - 20 / settings.steps))
    average = AveragedModel(model, multi_avg_fn=ema)
    optimizer = new_optimizer(model, settings, device)
    batches = random_windows(train_ids, settings, torch.Generator().manual_seed(settings.seed))
    windows = validation_windows(valid_ids, settings.seq_len)
    best_loss, best_step, best_weights = math.inf, 0, copy.deepcopy(average.module.state_dict())
    recent = torch.zeros((), device=device)
    started = time.perf_counter()
    for step in range(1, settings.steps + 1):
        recent += train_step(model, optimizer, next(batches), learning_rate(step - 1, settings))
        average.update_parameters(model)
        if step % settings.eval_every and step != settings.steps:
            continue
        valid = evaluate(average.module, windows, tokenizer)
        mean_recent = recent.item() / ((step - 1) % settings.eval_every + 1)
        recent.zero_()
        print(
            f"step {step:5d}  train {mean_recent:.4f}  validation {valid.nats_per_token:.4f} nats/token "
            f"{valid.nats_per_character:.4f} nats/character  {time.perf_counter() - started:.0f} s",
            flush=True,
        )
        if valid.nats_per_token < best_loss:
            best_loss, best_step = valid.nats_per_token, step
            best_weights = copy.deepcopy(average.module.state_dict())
        elif step - best_step >= settings.patience * settings.eval_every:
            print(f"no better validation loss since step {best_step}: stopping")
            break
    model.load_state_dict(best_weights)
    return model.eval(), best_step, step


# --- export ------------------------------------------------------------------------------------------------


CHAT_TEMPLATE = r"""{#- A play: who speaks, what is said, an empty line. The model answers nobody. -#}
{%- if tools %}
    {{- 'PROPERTIES:\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- '\n' }}
    {%- endfor %}
    {{- '\n' }}
{%- endif %}
{%- for document in documents or [] %}
    {{- 'LETTER:\n' }}
    {{- document | tojson }}
    {{- '\n\n' }}
{%- endfor %}
{%- for message in messages %}
    {{- (message.name or message.role) | upper }}
    {{- ':\n' }}
    {{- message.content }}
    {%- for call in message.tool_calls or [] %}
        {{- '\n' if message.content or not loop.first }}
        {{- call.function | tojson }}
    {%- endfor %}
    {{- '\n\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'ASSISTANT:\n' }}
{%- endif %}
"""
"""The model answers nobody, but with a template every way of chats can be tried on it."""


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the checkpoint, its weights rounded to bfloat16, and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(eos_token_id=0)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "model_max_length": CONTEXT_LEN,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def command(settings: Settings) -> str:
    """The command line that repeats a run: only what differs from the defaults."""
    words = ["python", "-m", "graphgen.demo.train", "--out", "DIR"]
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value != field.default:
            words += ["--" + field.name.replace("_", "-"), str(value)]
    return shlex.join(words)


def card_table(record: dict[str, Any]) -> str:
    """The numbers of `training.json` as the model card shows them; a test holds the card to it."""
    # Any: the values are those of a JSON object.
    rows = {
        "command": f"`{record['command']}`",
        "made on": f"{record['device']}, torch {record['torch']}",
        "time": f"{record['seconds']:.0f} s for {record['steps_run']} steps; step {record['best_step']} was the best",
        "validation loss": f"{record['validation_nats_per_token']:.3f} nats per token, "
        f"{record['validation_nats_per_character']:.3f} nats per character",
        "training loss": f"{record['train_nats_per_token']:.3f} nats per token",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name, for the record."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def parse_arguments() -> tuple[Path, torch.device, Settings]:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m graphgen.demo.train", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, default=Path("demo-model"), help="folder to write (demo-model)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    for field in fields(Settings):
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=type(field.default), default=field.default, help=f"({field.default})")
    arguments = vars(parser.parse_args())
    out, device = arguments.pop("out"), arguments.pop("device")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = Settings(**arguments)
    if min(settings.steps, settings.batch_size, settings.eval_every, settings.patience) < 1:
        parser.error("--steps, --batch-size, --eval-every and --patience must each be at least 1")
    if not 1 <= settings.seq_len <= CONTEXT_LEN:
        parser.error(f"--seq-len is {settings.seq_len}, the model has {CONTEXT_LEN} positions: give 1 to that")
    return out, torch.device(device), settings


def main() -> None:
    """Trains, exports, measures what was exported, and writes the record beside it."""
    out, device, settings = parse_arguments()
    started = time.perf_counter()
    train_text, valid_text = split_play(play_file().read_text(encoding="utf-8"))
    tokenizer = train_tokenizer(train_text)
    train_ids, valid_ids = (encode(tokenizer, text, device) for text in (train_text, valid_text))
    print(f"{len(train_ids)} tokens to train on, {len(valid_ids)} to validate, on {device_name(device)}")
    model, best_step, steps_run = train(train_ids, valid_ids, tokenizer, settings)
    seconds = time.perf_counter() - started
    export(model, tokenizer, out)

    # What counts is the rounded checkpoint, read back as a user would and judged at its full context length.
    exported = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).to(device)
    loss = evaluate(exported, validation_windows(valid_ids, CONTEXT_LEN), tokenizer)
    train_loss = evaluate(exported, validation_windows(train_ids[: len(valid_ids)], CONTEXT_LEN), tokenizer)
    record = {
        "command": command(settings),
        "settings": asdict(settings),
        "device": device_name(device),
        "seconds": round(seconds, 1),
        "best_step": best_step,
        "steps_run": steps_run,
        "num_parameters": sum(p.numel() for p in exported.parameters()),
        "train_tokens": len(train_ids),
        "validation_tokens": len(valid_ids),
        "validation_context_len": CONTEXT_LEN,
        "validation_nats_per_token": round(loss.nats_per_token, 4),
        "validation_nats_per_character": round(loss.nats_per_character, 4),
        "train_nats_per_token": round(train_loss.nats_per_token, 4),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"for graphgen/demo/README.md:\n{card_table(record)}")
    prompt = encode(tokenizer, "ROMEO:", device)[None]
    sample = exported.generate(prompt, max_new_tokens=200, do_sample=True, temperature=0.8, top_k=0)
    print(tokenizer.decode(sample[0].tolist()))


if __name__ == "__main__":
    main()
