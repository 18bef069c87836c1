"""The defences, and the controls beside them: what a recipe's methods are made of.

A line here and a module of its own is all that another one takes (CONTRIBUTING.md has one written out). A step is made
in this order, each around what those before it make (defences/making.py).
"""

from pipeline.defences.ema import EMA
from pipeline.defences.lisa import LISA
from pipeline.defences.safe_mix import SAFE_MIX
from pipeline.defences.safety_gradient import SAFETY_GRADIENT
from pipeline.defences.saft import SAFT
from pipeline.defences.sap import SAP

DEFENCES = {
    "saft": SAFT,
    "sap": SAP,
    "safety_gradient": SAFETY_GRADIENT,
    "lisa": LISA,
    "safe_mix": SAFE_MIX,
    "ema": EMA,
}
