"""AdapterHub's LoRA alone: the low rank of PEFT's under other names.

y = W x + b + s·B A x      s = α / r;  A [r,in]  B [out,r]
"""

from __future__ import annotations

from adapter_server.families.adapterhub import TOP, AdapterHub
from adapter_server.families.hublora import KNOWN as LORA
from adapter_server.families.hublora import REFUSED as NO_LORA

KNOWN = (TOP | LORA) - {"use_gating"}
REFUSED = NO_LORA


class HubLora(AdapterHub):
    """Its Linears are those that the library names in each layer."""

    name = "ADAPTERHUB_LORA"


FAMILY = HubLora()
