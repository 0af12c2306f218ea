"""What the model learns by looking at itself, and RoPE variants that look at the batch's longest row."""

from __future__ import annotations

import pytest
import torch
import transformers

import rig
import zoo
from adapter_server.config import EngineConfig
from adapter_server.engine.engine import Engine
from adapter_server.engine.model import Model
from adapter_server.engine.routing import Routing, Step, running
from adapter_server.errors import BaseNotSupported
from adapter_server.registry.store import Store


def test_linears_that_read_one_input_are_one_group() -> None:
    model = Model(zoo.tiny_base("llama"))
    leaves = [tuple(p.rsplit(".", 1)[-1] for p in g.paths) for g in model.groups]
    assert leaves == [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)] * 2 + [
        ("lm_head",)
    ]
    assert [g.head for g in model.groups] == [False] * 8 + [True]


def test_grouping_neither_copies_nor_changes_the_base() -> None:
    plain, grouped = zoo.tiny_base("qwen2"), zoo.tiny_base("qwen2")
    model = Model(grouped)
    for (name, a), (_, b) in zip(plain.state_dict().items(), grouped.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    q, k, _ = (grouped.get_submodule(p).weight for p in model.groups[0].paths)
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        assert torch.allclose(plain(ids).logits, grouped(ids, use_cache=False).logits, atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3"])
def test_packed_weights_change_nothing(arch: str) -> None:
    prompt = rig.PROMPTS[3]
    for pack in (True, False):
        engine = rig.engine(arch, pack_weights=pack)
        answer = rig.run(engine, [rig.ask(engine, "lora", prompt)])[0]
        ids, logprobs = rig.peft_alone(arch, "lora", prompt)
        assert tuple(answer.ids) == ids
        assert (answer.matrix() - logprobs).abs().max() < 1e-4
        engine.close()


def test_a_base_that_does_not_call_the_interface_is_refused() -> None:
    config = transformers.BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2)
    with pytest.raises(BaseNotSupported, match="AttentionInterface"):
        Model(transformers.AutoModelForCausalLM.from_config(config).eval())


def test_a_step_refuses_nesting() -> None:
    step = Step(Routing(1), Routing(1))
    with running(step), pytest.raises(RuntimeError), running(step):
        pass
    with running(step):
        pass


LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 16,
    "rope_theta": 10000.0,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}


def rope_base(rope: dict[str, object]) -> transformers.PreTrainedModel:
    config_class = transformers.Phi3Config if rope["rope_type"] == "longrope" else transformers.LlamaConfig
    config = config_class(
        **{**zoo.COMMON, "max_position_embeddings": 16 if rope is DYNAMIC else 64},
        rope_parameters=rope,
        **({"original_max_position_embeddings": 16} if rope is LONG else {}),
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for p in model.parameters():
        p.data = 0.3 * torch.randn_like(p) if p.dim() > 1 else p.data
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("rope", [LONG, DYNAMIC], ids=["longrope", "dynamic"])
def test_no_row_changes_anothers_rope(rope: dict[str, object], tmp_path) -> None:
    """Rows short and long at once, some growing past the border, each as it is alone."""
    prompts = [(5, 6, 7), tuple(range(3, 40)), tuple(range(60, 73)), (9,)]
    new = 10
    want = []
    for prompt in prompts:
        with torch.inference_mode(), zoo.quiet():
            out = rope_base(rope).generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False, use_cache=True)
        want.append(out[0, len(prompt) :].tolist())
    engine = Engine(rope_base(rope), EngineConfig(kv_bytes=16 << 20, max_step_tokens=24), Store(tmp_path))
    answers = rig.run(engine, [rig.ask(engine, None, p, max_new_tokens=new, logprobs=0) for p in prompts], stagger=1)
    assert [a.ids for a in answers] == want
    engine.close()
