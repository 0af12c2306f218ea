"""WaveFT's transform against PEFT's own, over odd and even sides."""

import peft
import pytest
import torch
from peft.tuners.waveft.wavelet import Wavelet
from torch import nn

import zoo
from adapter_server.core import Spec
from adapter_server.families import find
from adapter_server.families.facts import ModelBase, describe
from adapter_server.families.waveft import WAVELETS, daubechies


class Tiny(nn.Module):
    """A base with one Linear of odd sides beside an embedding and a head."""

    def __init__(self):
        super().__init__()
        self.config = zoo.CONFIGS["llama"]()
        self.embed, self.odd, self.head = nn.Embedding(9, 4), nn.Linear(15, 22), nn.Linear(4, 9)

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head


@pytest.mark.parametrize("name", WAVELETS)
def test_the_filters_are_the_wavelets(name):
    want = torch.tensor(Wavelet(name).rec_lo)
    assert torch.allclose(torch.tensor(daubechies(WAVELETS.index(name) + 1)), want, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["db1", "db2", "db5", "db10"])
def test_sides_that_are_odd(name):
    base, options = Tiny(), {"target_modules": ["odd"], "n_frequency": 40, "scaling": 3.0, "wavelet_family": name}
    oracle = peft.tuners.waveft.WaveFTModel(Tiny(), peft.WaveFTConfig(**options), "default").model.odd
    oracle.base_layer.load_state_dict(base.odd.state_dict())
    values = oracle.waveft_spectrum["default"].normal_()
    served = {"peft_type": "WAVEFT", **options}
    tensors = {"base_model.model.odd.waveft_spectrum": values}
    patch = find("WAVEFT").load(Spec("a", "0" * 12, "", "WAVEFT", served, 0), tensors, ModelBase(base)).patches["odd"]
    x = zoo.inputs(describe(base).modules["odd"])
    assert zoo.same(patch.apply(x, base.odd), oracle(x))
