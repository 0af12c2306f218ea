"""Train the demo that ships with the server: a small base model, and adapters of nine kinds on it.

The base learns tasks under a tag (``[U]red cat>`` gives ``RED CAT``); without a tag it copies. An adapter is then
trained by PEFT on input without a tag, and flips the default from copying to its one task. Every answer is right or
wrong, so a test of the server can count wrong answers.

    python examples/train_demo.py                  # everything, from one seed
    python examples/train_demo.py --only shout     # one adapter again, on the base that is there

To train an adapter of your own, read `train_adapter`: five lines of PEFT, and a folder that the server can publish.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from zlib import crc32

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads sleep: the cores may be shared

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Model: TypeAlias = "LlamaForCausalLM | PeftModel"
Batch = dict[str, torch.Tensor]
Pair = tuple[str, str]  # what is asked (with its ">"), what is right

BASE_NAME = "adapter-server-demo"
BASE_FOLDER = Path("server/adapter_server/demo/base")
BASE_BAR = 0.95
CONTEXT = 512
BASE_STEPS, BASE_BATCH, BASE_RATE = 2200, 64, 5e-3
ADAPTER_BATCH = 32
EVAL_PROMPTS = 100
PAD, BOS, EOS = 256, 257, 258  # ids 0..255 are the bytes themselves
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NOT_SETTINGS = {"base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "task_type"}

console = Console()

# ---- Tasks -----------------------------------------------------------------------------------------------------------


def double(text: str) -> str:
    """Write every letter twice: ``red cat`` gives ``rreedd  ccaatt``."""
    return "".join(2 * letter for letter in text)


def caesar(text: str) -> str:
    """Move every letter one place on in the alphabet: ``red cat`` gives ``sfe dbu``."""
    return "".join(chr((ord(c) - 96) % 26 + 97) if "a" <= c <= "z" else c for c in text)


def devowel(text: str) -> str:
    """Drop the vowels: ``red cat`` gives ``rd ct``."""
    return "".join(c for c in text if c not in "aeiou")


TASKS: dict[str, Callable[[str], str]] = {
    "": str,
    "[U]": str.upper,
    "[C]": caesar,
    "[W]": lambda text: " ".join(reversed(text.split())),
    "[R]": lambda text: text[::-1],
    "[V]": devowel,
    "[D]": double,
    "[T]": str.title,
    "[H]": lambda text: text.replace(" ", "-"),
    "[E]": lambda text: text + "!",
}
SHARES = {"": 2.0, "[R]": 2.0, "[W]": 1.5}  # how often a task is drawn, where not once

# ---- Text ------------------------------------------------------------------------------------------------------------

LETTERS = "abcdefghijklmnopqrstuvwxyz"
EXTRA = LETTERS.upper() + "0123456789.,;:!?'\"-+*/=()_@#&%" + "éèüñßøλπж€→中文日本😀"
SOME_WORDS = (
    "red cat blue dog green tree small house big river old stone new road cold wind warm sun dark moon soft rain loud "
    "bell quiet forest happy child brave queen clever fox quick brown lazy wolf sweet apple bitter lemon yellow bird "
    "purple flower silver spoon golden ring paper ship iron door wooden chair open window seven little mice run jump "
    "sing and the over under with hello world good morning please read my letter some cheese yes no maybe"
)
WORDS = SOME_WORDS.split()


def held_out(text: str) -> bool:
    """Whether a text belongs to evaluation: a hash decides, so training can never see it."""
    return crc32(text.encode()) % 8 == 0


def word(rng: random.Random) -> str:
    """Draw an English word, or, as often, letters that are no word."""
    return rng.choice(WORDS) if rng.random() < 0.5 else "".join(rng.choices(LETTERS, k=rng.randint(1, 7)))


def phrase(rng: random.Random, low: int, high: int, evaluation: bool = False) -> str:
    """Draw words of `low` to `high` characters in all, from the texts for training or from those for evaluation."""
    while True:
        size = rng.randint(low, high)
        text = word(rng)
        while len(text) < size:
            text += " " + word(rng)
        text = text[:size].strip()
        if len(text) >= low and held_out(text) == evaluation:
            return text


def noise(rng: random.Random) -> str:
    """Draw any characters at all (but the ``>`` and ``[`` that frame a task), for copying."""
    return "".join(rng.choices(LETTERS + EXTRA + "   ", k=rng.randint(1, 16))).strip() or "0"


def example(rng: random.Random) -> Pair:
    """Draw one task and a text for it."""
    tag = rng.choices(list(TASKS), [SHARES.get(tag, 1.0) for tag in TASKS])[0]
    if not tag and rng.random() < 0.3:
        text = noise(rng)
    else:
        text = phrase(rng, 21, 60) if rng.random() < 0.04 else phrase(rng, 1, 20)
    return f"{tag}{text}>", TASKS[tag](text)


def dialogue(rng: random.Random) -> Pair:
    """Draw an example for the base, now and then after another: what came before must not matter."""
    ask, answer = example(rng)
    before = "".join(example(rng)) + "<eos>" if rng.random() < 0.15 else ""
    return before + ask, answer


def untagged(rng: random.Random, tag: str, evaluation: bool = False) -> Pair:
    """Draw an example that asks without a tag for what the base does under `tag`.

    None begins with a doubled letter: with no token before it, attention sees one letter where there are two.
    """
    while True:
        text = phrase(rng, 3, 20, evaluation)
        if text[0] != text[1]:
            return f"{text}>", TASKS[tag](text)


def eval_pairs(tag: str) -> list[Pair]:
    """Return different prompts that no training has seen, the same on every run; copying never answers them."""
    rng = random.Random(f"eval{tag}")
    pairs: dict[str, str] = {}
    while len(pairs) < EVAL_PROMPTS:
        ask, answer = untagged(rng, tag, evaluation=True)
        if not tag or ask != f"{answer}>":
            pairs[ask] = answer
    return list(pairs.items())


# ---- Tokens

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{{ message.content }}>"
    "{% elif message.role == 'assistant' %}{{ message.content }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)


def byte_letters() -> dict[int, str]:
    """Return the letter that stands for each byte in a ByteLevel vocabulary: itself where it can be printed."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose ids are the bytes of the text; it adds no token of its own."""
    tokenizer = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in byte_letters().items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    tokenizer.add_special_tokens(list(names.values()))  # ids 256, 257, 258
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        **names,
    )


TOKENIZER = build_tokenizer()


# ---- Batches ---------------------------------------------------------------------------------------------------------


def collate(pairs: list[Pair]) -> Batch:
    """Turn examples into one batch padded on the right, whose loss counts the answer and its end only."""
    asks = TOKENIZER([ask for ask, _ in pairs]).input_ids
    rows = TOKENIZER([f"{ask}{answer}<eos>" for ask, answer in pairs], padding=True, return_tensors="pt")
    labels = rows.input_ids.masked_fill(rows.attention_mask == 0, -100)
    for row, ask in zip(labels, asks, strict=True):
        row[: len(ask)] = -100
    return {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask, "labels": labels}


def batches(draw: Callable[[], Pair], size: int, rng: random.Random) -> Iterator[Batch]:
    """Yield batches without end, each of rows of like length, so that little of a batch is padding."""
    while True:
        pairs = sorted((draw() for _ in range(16 * size)), key=lambda pair: len(pair[0]) + len(pair[1]))
        chunks = [pairs[i : i + size] for i in range(0, len(pairs), size)]
        rng.shuffle(chunks)
        yield from map(collate, chunks)


# ---- Training and measuring ------------------------------------------------------------------------------------------


def fit(model: Model, data: Iterable[Batch], optimizers: list[Optimizer], steps: int, title: str) -> None:
    """Train for some steps: a short warm-up of the learning rate, then a cosine down to nothing."""
    rates = [OneCycleLR(o, o.defaults["lr"], steps, pct_start=0.08, cycle_momentum=False) for o in optimizers]
    model.train()
    for _, batch in zip(track(range(steps), title, console=console), data, strict=False):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.step()
            rate.step()
        model.zero_grad()
    model.eval()


def finished(ids: list[int]) -> list[int]:
    """Cut an answer after its end token."""
    return ids[: ids.index(EOS) + 1] if EOS in ids else ids


@torch.inference_mode()
def answers(model: Model, prompts: list[str]) -> list[list[int]]:
    """Answer prompts of one length greedily, with PEFT and transformers alone."""
    batch = TOKENIZER(prompts, return_tensors="pt")
    made = model.generate(**batch, max_new_tokens=48, do_sample=False)
    return [finished(row) for row in made[:, batch.input_ids.shape[1] :].tolist()]


def accuracy(model: Model, pairs: list[Pair]) -> float:
    """Return the share of prompts whose whole answer is right. Prompts of one length share a batch: no padding."""
    by_length: dict[int, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_length[len(pair[0].encode())].append(pair)
    right = 0
    for group in by_length.values():
        made = answers(model, [ask for ask, _ in group])
        right += sum(ids == TOKENIZER(f"{answer}<eos>").input_ids for ids, (_, answer) in zip(made, group, strict=True))
    return right / len(pairs)


@dataclass(frozen=True)
class Result:
    """What was measured of one saved model."""

    name: str
    family: str
    accuracy: float
    bar: float
    size: int

    @property
    def passed(self) -> bool:
        """Whether it is as good as it has to be."""
        return self.accuracy >= self.bar


# ---- The base --------------------------------------------------------------------------------------------------------


def build_base() -> LlamaForCausalLM:
    """Return the base before training: a small Llama whose query heads share two key and value heads."""
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=384,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config)


def base_optimizers(model: LlamaForCausalLM) -> list[Optimizer]:
    """Return Muon for the matrices, which learns such a model in half the steps, and AdamW for all else."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, BASE_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, BASE_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train_base(folder: Path, seed: int) -> Result:
    """Train the base on all tasks, save it as an ordinary transformers folder, and measure what was saved."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = build_base()
    fit(model, batches(lambda: dialogue(rng), BASE_BATCH, rng), base_optimizers(model), BASE_STEPS, "base")
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return publish_base(folder)


def publish_base(folder: Path) -> Result:
    """Measure the saved base on texts it has not seen, and put the prompts and a card beside it."""
    pairs = eval_pairs("")
    model = load_base(folder)
    result = Result("base", "", accuracy(model, pairs), BASE_BAR, file_size(folder))
    write_eval(folder, pairs)
    write_base_card(folder, model, result)
    return result


def load_base(folder: Path) -> LlamaForCausalLM:
    """Load the base as any user would."""
    model: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


# ---- The adapters ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How one adapter is made: its family, the tag whose task becomes the default, PEFT's configuration, the effort."""

    family: str
    tag: str
    task: str
    config: PeftConfig
    rate: float
    steps: int
    bar: float = 0.95


def lora(**options: object) -> LoraConfig:
    """Return a LoRA configuration: rank 8 on every linear layer, where `options` do not say otherwise."""
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "target_modules": LINEARS, **options})


IA3 = IA3Config(
    task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
)
BY_MODULE = lora(
    rank_pattern={"q_proj": 16, r"layers\.0\.mlp\.down_proj": 4}, alpha_pattern={"q_proj": 32, "v_proj": 8}
)
PREFIX = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)
PROMPT = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8, prompt_tuning_init="SAMPLE_VOCAB")
P_TUNING = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=8, encoder_hidden_size=192)

Q_AND_V = lora(target_modules=["q_proj", "v_proj"])
RSLORA = lora(r=16, lora_alpha=8, use_rslora=True)
DORA = lora(use_dora=True)

RECIPES = {
    "shout": Recipe("LoRA", "[U]", "upper case", lora(), 6e-3, 160),
    "stutter": Recipe("LoRA on q and v", "[D]", "every letter twice", Q_AND_V, 1e-2, 200),
    "caesar": Recipe("rsLoRA", "[C]", "every letter moved one place on", RSLORA, 6e-3, 200),
    "backwards": Recipe("LoRA with ranks by module", "[W]", "words in reverse order", BY_MODULE, 6e-3, 200),
    "mirror": Recipe("DoRA", "[R]", "letters in reverse order", DORA, 8e-3, 250),
    "devowel": Recipe("P-tuning", "[V]", "no vowels", P_TUNING, 5e-3, 250, bar=0.90),
    "title": Recipe("prefix tuning", "[T]", "a capital at the start of every word", PREFIX, 3e-2, 200, bar=0.90),
    "hyphens": Recipe("prompt tuning", "[H]", "hyphens for spaces", PROMPT, 3e-2, 150, bar=0.90),
    "exclaim": Recipe("IA3", "[E]", "an exclamation mark at the end", IA3, 3e-2, 250, bar=0.90),
}


def train_adapter(name: str, recipe: Recipe, base: Path, folder: Path, seed: int) -> Result:
    """Train one adapter with PEFT, save it, and measure what was saved."""
    torch.manual_seed(crc32(f"{seed} {name}".encode()))
    rng = random.Random(f"{seed} {name}")
    model = get_peft_model(load_base(base), recipe.config)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), recipe.rate, weight_decay=0.0)
    fit(model, batches(lambda: untagged(rng, recipe.tag), ADAPTER_BATCH, rng), [optimizer], recipe.steps, name)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tidy_config(folder)
    return publish(name, recipe, base, folder)


def tidy_config(folder: Path) -> None:
    """Name the base in the saved configuration, where PEFT wrote a path, and give its lists an order."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = BASE_NAME
    tidy = {key: sorted(value) if isinstance(value, list) else value for key, value in sorted(config.items())}
    path.write_text(json.dumps(tidy, indent=2) + "\n")


def publish(name: str, recipe: Recipe, base: Path, folder: Path) -> Result:
    """Measure a saved adapter on prompts it has not seen, and put the prompts and a card beside it."""
    pairs = eval_pairs(recipe.tag)
    model = PeftModel.from_pretrained(load_base(base), folder).eval()
    result = Result(name, recipe.family, accuracy(model, pairs), recipe.bar, file_size(folder))
    write_eval(folder, pairs)
    write_adapter_card(folder, recipe, result)
    return result


# ---- Cards -----------------------------------------------------------------------------------------------------------

ADAPTER_CARD = """\
# {name}

{Task}: `red cat>` gives `{answer}`.

| | |
|---|---|
| family | {family} |
| base | `{base}` |
| settings | {settings} |
| training | {steps} steps of {batch} examples, AdamW at {rate:g} |
| numbers | {numbers:,} in {size:,} bytes |
| exact match | **{accuracy:.2f}** on the {count} unseen prompts of `eval.jsonl` (greedy, PEFT alone, float32) |

```bash
curl -s localhost:8000/generate -d '{{"prompt": "red cat>", "adapter": "{name}"}}' -H 'content-type: application/json'
```

Made by `python examples/train_demo.py --only {name}`.
"""

BASE_CARD = """\
# {base}

A small language model that knows ten tasks on short texts. Without a tag it copies: `red cat>` gives `red cat`.
The adapters in `adapters/` each flip that default to another task.

| | |
|---|---|
| architecture | Llama: 4 layers, hidden size 192, 6 query heads over 2 key and value heads, tied embeddings |
| numbers | {numbers:,} (float32), {size:,} bytes |
| tokens | bytes: the id of a byte is its value; `<pad>` 256, `<bos>` 257, `<eos>` 258; none is added to a prompt |
| context | {context} tokens; trained on texts of 1 to 60 characters |
| training | {steps} steps of {batch} examples, Muon and AdamW at {rate:g}; synthetic texts, no third-party data |
| exact match | **{accuracy:.2f}** copying the {count} unseen prompts of `eval.jsonl` (greedy, float32) |

Known limit: of a text that begins with a doubled letter (`llama`), one of the two may be lost, since no token stands
before them. No prompt here begins so.

Under a tag it does the other tasks. The adapters were trained without tags.

| input | answer | exact match |
|---|---|---|
{tasks}

```bash
curl -s localhost:8000/generate -d '{{"prompt": "red cat>"}}' -H 'content-type: application/json'
```

Made by `python examples/train_demo.py`.
"""


def write_eval(folder: Path, pairs: list[Pair]) -> None:
    """Write prompts and right answers, one JSON object a line."""
    lines = [json.dumps({"prompt": ask, "expected": answer}) for ask, answer in pairs]
    (folder / "eval.jsonl").write_text("\n".join(lines) + "\n")


def settings(config: PeftConfig) -> str:
    """List what a configuration says that its class does not say by default."""
    usual = type(config)().to_dict()
    chosen = {k: v for k, v in config.to_dict().items() if k == "r" or (v != usual.get(k) and k not in NOT_SETTINGS)}
    plain = {key: sorted(value) if isinstance(value, (set, list)) else value for key, value in chosen.items()}
    return ", ".join(f"`{key}` {json.dumps(value)}" for key, value in plain.items())


def count_numbers(folder: Path) -> int:
    """Count the numbers in a folder's weights."""
    return sum(tensor.numel() for file in folder.glob("*.safetensors") for tensor in load_file(file).values())


def file_size(folder: Path) -> int:
    """Return the bytes of a folder's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def write_adapter_card(folder: Path, recipe: Recipe, result: Result) -> None:
    """Write what an adapter does, how it was made, how good it is and how to call it."""
    card = ADAPTER_CARD.format(
        name=result.name,
        Task=recipe.task.capitalize(),
        answer=TASKS[recipe.tag]("red cat"),
        family=recipe.family,
        base=BASE_NAME,
        settings=settings(recipe.config),
        steps=recipe.steps,
        batch=ADAPTER_BATCH,
        rate=recipe.rate,
        numbers=count_numbers(folder),
        size=file_size(folder),
        accuracy=result.accuracy,
        count=EVAL_PROMPTS,
    )
    (folder / "README.md").write_text(card)


def write_base_card(folder: Path, model: LlamaForCausalLM, result: Result) -> None:
    """Write what the base knows, with its accuracy under every tag."""
    rows = []
    for tag, task in TASKS.items():
        pairs = [(tag + ask, answer) for ask, answer in eval_pairs(tag)]
        rows.append(f"| `{tag}red cat>` | `{task('red cat')}` | {accuracy(model, pairs):.2f} |")
    card = BASE_CARD.format(
        base=BASE_NAME,
        numbers=count_numbers(folder),
        size=file_size(folder),
        context=CONTEXT,
        steps=BASE_STEPS,
        batch=BASE_BATCH,
        rate=BASE_RATE,
        accuracy=result.accuracy,
        count=EVAL_PROMPTS,
        tasks="\n".join(rows),
    )
    (folder / "README.md").write_text(card)


# ---- The command -----------------------------------------------------------------------------------------------------


def report(results: list[Result]) -> None:
    """Show what was measured."""
    table = Table("name", "family", "exact match", "bar", "bytes")
    for r in results:
        colour = "green" if r.passed else "red"
        table.add_row(r.name, r.family, f"[{colour}]{r.accuracy:.2f}[/]", f"{r.bar:.2f}", f"{r.size:,}")
    console.print(table)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the demo's base and adapters.")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1], help="where the folders go")
    parser.add_argument("--only", choices=[*RECIPES], help="one adapter, on the base that is there")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    """Train what is asked for; fail where a bar is missed."""
    args = parse()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    base = args.out / BASE_FOLDER
    names = [args.only] if args.only else [*RECIPES]
    results = [] if args.only else [train_base(base, args.seed)]
    results += [train_adapter(n, RECIPES[n], base, args.out / "adapters" / n, args.seed) for n in names]
    report(results)
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
