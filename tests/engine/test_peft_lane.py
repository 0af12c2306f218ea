"""Bases that no patch reaches: every kind of adapter over them is PEFT's own, token by token and merged."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import rig
import zoo
from adapter_server.config import EngineConfig
from adapter_server.core import Constraint
from adapter_server.engine.engine import Engine
from adapter_server.engine.guide import Guides
from adapter_server.engine.model import load
from adapter_server.errors import AdapterRefused, BaseNotSupported, InvalidRequest, NotMergeable
from adapter_server.families import before_the_prompt
from adapter_server.registry.store import Store
from fakes import save_byte_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns while it loads, on a thread of ours
TOLERANCE = 1e-4
TOKENS = {"vocab_size": zoo.VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}

BASES: dict[str, tuple[str, dict[str, object], list[str], str]] = {  # type, its options, targets, why this lane
    "t5": ("t5", T5, ["q", "v", "wi", "wo"], "encoder-decoder"),
    "mt5": ("mt5", {**T5, "tie_word_embeddings": False}, ["q", "v", "wo"], "encoder-decoder"),
    "gpt_neo": (
        "gpt_neo",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
        | {"window_size": 8, "max_position_embeddings": 128, "intermediate_size": 48},
        ["q_proj", "v_proj", "c_fc"],
        "0 of 2 layers call",
    ),
    "mamba": (
        "mamba",
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
        ["in_proj", "x_proj"],
        "0 of 2 layers call",
    ),
}


def base(name: str) -> transformers.PreTrainedModel:
    kind, own, *_ = BASES[name]
    config = transformers.AutoConfig.for_model(kind, **TOKENS, **own)
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    model.tie_weights()
    model.generation_config.eos_token_id = None
    return model.eval()


def adapters(name: str) -> dict[str, peft.PeftConfig]:
    task = "SEQ_2_SEQ_LM" if base(name).config.is_encoder_decoder else "CAUSAL_LM"
    on = {"task_type": task, "target_modules": BASES[name][2]}
    soft: dict[str, object] = {"num_virtual_tokens": 3, "task_type": task}
    if task == "CAUSAL_LM":
        soft |= {"num_layers": 2, "num_attention_heads": 4, "token_dim": 32}
    return {
        "lora": peft.LoraConfig(r=4, **on),
        "dora": peft.LoraConfig(r=4, use_dora=True, **on),
        "biases": peft.LoraConfig(r=4, bias="all", **on),
        "pissa": peft.LoraConfig(r=4, init_lora_weights="pissa", **on),
        "saved": peft.LoraConfig(r=4, modules_to_save=["lm_head"], **on),
        "ia3": peft.IA3Config(feedforward_modules=BASES[name][2][-1:], **on),
        "adalora": peft.AdaLoraConfig(init_r=4, total_step=10, **on),
        "osf": peft.OSFConfig(**on),
        "vera": peft.VeraConfig(r=4, **on),
        "lily": peft.LilyConfig(r=4, num_B=2, **on),
        "skills": peft.PolyConfig(r=2, n_tasks=2, n_skills=2, **on),
        "prefix": peft.PrefixTuningConfig(**soft),
        "prompt": peft.PromptTuningConfig(**soft),
        "multitask": peft.MultitaskPromptTuningConfig(num_tasks=2, num_ranks=2, **soft),
    }


TASKED = ("skills", "multitask")


@pytest.fixture(scope="module", params=BASES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    name = request.param
    root = tmp_path_factory.mktemp(name)
    kinds = adapters(name)
    chosen = kinds if name == "t5" else {k: kinds[k] for k in ("lora", "biases", "pissa", "lily", "prefix", "prompt")}
    for seed, (adapter, config) in enumerate(chosen.items()):
        zoo.save_adapter(functools.partial(base, name), config, root / adapter, seed)
    return name, root


def over(name: str, root: Path) -> Engine:
    return Engine(base(name), EngineConfig(kv_bytes=16 << 20, max_step_tokens=20), Store(root, settle_s=0))


def alone(name: str, folder: Path | None, prompt: tuple[int, ...]) -> tuple[list[int], Tensor]:
    model = base(name) if folder is None else zoo.load_peft(base(name), folder)
    task = {"task_ids": torch.tensor([1])} if folder is not None and folder.name in TASKED else {}
    with torch.inference_mode():
        out = model.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=rig.NEW, do_sample=False, output_logits=True, return_dict_in_generate=True, **task,
        )  # fmt: skip
    logits = torch.stack(out.logits, 1)[0].float()
    return logits.argmax(-1).tolist(), logits.log_softmax(-1)


def test_every_adapter_is_as_peft_alone_and_merged_as_unmerged(served: tuple[str, Path]) -> None:
    name, root = served
    engine = over(name, root)
    assert engine.info.lane == "peft"
    assert BASES[name][3] in engine.info.lane_why
    digest = engine.model.digest()
    names = [None, *sorted(folder.name for folder in root.iterdir()), None]
    foldable = [n for n in names if n and not before_the_prompt(adapters(name)[n].peft_type.value) and n not in KEPT]
    asked = [(n, "unmerged") for n in names] + [(n, "merged") for n in foldable]
    cases = [(n, mode, rig.PROMPTS[i % len(rig.PROMPTS)]) for i, (n, mode) in enumerate(asked)]
    answers = rig.run(engine, [ask(engine, *case) for case in cases], stagger=1)
    for (adapter, mode, prompt), answer in zip(cases, answers, strict=True):
        assert answer.end is not None
        assert answer.end.error is None, (adapter, mode, answer.end.error.message, answer.end.error.__cause__)
        ids, logprobs = alone(name, None if adapter is None else root / adapter, prompt)
        assert answer.ids == ids, (adapter, mode)
        assert (answer.matrix() - logprobs).abs().max().item() < TOLERANCE, (adapter, mode)
    assert engine.model.digest() == digest
    engine.close()


KEPT = ("lily", "skills")  # that have no merged form


def ask(engine: Engine, name: str | None, mode: str, prompt: tuple[int, ...]):
    return rig.ask(engine, name, prompt, mode=mode, task_id=1 if name in TASKED else None)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    root = tmp_path_factory.mktemp("t5")
    for seed, adapter in enumerate(("lora", "skills", "prompt", "dora")):
        zoo.save_adapter(functools.partial(base, "t5"), adapters("t5")[adapter], root / adapter, seed)
    zoo.save_adapter(lambda: zoo.tiny_base("llama"), zoo.ADAPTERS["lora"](zoo.tiny_base("llama")), root / "foreign")
    engine = over("t5", root)
    yield engine
    engine.close()


def refusal(engine: Engine, name: str, **asked: object) -> Exception:
    [answer] = rig.run(engine, [rig.ask(engine, name, (5, 6), **asked)])  # type: ignore[arg-type]
    assert answer.end is not None
    assert answer.end.error is not None
    return answer.end.error


def test_what_has_no_meaning_there_is_refused(t5: Engine) -> None:
    assert isinstance(refusal(t5, "skills"), InvalidRequest)
    assert isinstance(refusal(t5, "skills", task_id=2), InvalidRequest)
    assert isinstance(refusal(t5, "prompt", mode="merged"), NotMergeable)
    assert isinstance(refusal(t5, "dora", weight=0.5), InvalidRequest)
    assert isinstance(refusal(t5, "foreign"), AdapterRefused)
    rated = refusal(t5, "lora", prompt_logprobs=1)
    assert isinstance(rated, InvalidRequest)
    assert rated.param == "prompt_logprobs"


def test_a_form_is_followed_there_too(t5: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a tokenizer that knows more tokens than the head has, too."""
    guides = Guides(save_byte_tokenizer(tmp_path), t5.info.vocab, t5.info.eos, 1 << 10)
    monkeypatch.setattr(t5, "guides", guides)
    form = Constraint("regex", "([a-d]|[R-T]{2}){4}")
    names = [None, "lora", "prompt"]
    for answer in rig.run(t5, [rig.ask(t5, name, (5, 6), constraint=form) for name in names]):
        assert answer.end is not None
        assert answer.end.reason == "stop", answer.end.error
        assert re.fullmatch(form.text, "".join(chr(id + ord("!")) for id in answer.ids))
    guides.close()


def test_a_scale_lies_between_the_base_and_the_adapter(t5: Engine) -> None:
    rows = [rig.ask(t5, "lora", rig.PROMPTS[1], weight=w) for w in (0.0, 1.0)]
    none, whole = rig.run(t5, rows)
    [plain] = rig.run(t5, [rig.ask(t5, None, rig.PROMPTS[1])])
    assert none.ids == plain.ids
    assert whole.ids != plain.ids


def test_a_resident_of_the_lane_says_what_it_takes(t5: Engine) -> None:
    rig.run(t5, [rig.ask(t5, "lora", (5, 6)), rig.ask(t5, "lora", (5, 6), mode="merged")])
    [held] = [r for r in t5.stats().residents if r.name == "lora"]
    file = Path(t5.pool.store.resolve("lora").path) / "adapter_model.safetensors"
    assert held.bytes == sum(t.nbytes for t in load_file(file).values())
    touched = sum(m.weight.nbytes for n, m in t5.model.module.named_modules() if n.split(".")[-1] in BASES["t5"][2])
    assert held.snapshot_bytes == touched


def test_an_encoder_decoder_is_loaded_from_a_folder(tmp_path: Path) -> None:
    base("t5").save_pretrained(tmp_path)
    assert load(tmp_path, "auto", torch.device("cpu")).config.is_encoder_decoder


def test_a_base_that_nothing_runs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.GPTNeoForCausalLM, "prepare_inputs_for_generation", None)
    with pytest.raises(BaseNotSupported, match="does not run it either"):
        over("gpt_neo", tmp_path)
