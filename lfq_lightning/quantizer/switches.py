"""The three switches of a fake quantizer, and the phases that are named combinations of them."""

from __future__ import annotations

from typing import Any, Self

from lfq_lightning.schedule import Phase, check_phase

# (fake_quant_enabled, static_enabled, learning_enabled)
_SWITCHES: dict[Phase, tuple[bool, bool, bool]] = {
    "off": (False, False, False),
    "observe": (False, True, False),
    "estimate": (True, True, False),
    "learn": (True, False, True),
    "freeze": (True, False, False),
}


class Switches:
    """Whether the output is quantized, whether the input is observed, and whether the qparams learn.

    Plain Python values: a tensor flag would cost a device synchronisation in every forward, and weight averaging would
    corrupt it. Any combination can be set; `phase` names five of them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fake_quant_enabled, self.static_enabled, self.learning_enabled = _SWITCHES["estimate"]

    @property
    def switches(self) -> list[bool]:
        """fake_quant_enabled, static_enabled and learning_enabled."""
        return [bool(self.fake_quant_enabled), bool(self.static_enabled), bool(self.learning_enabled)]

    def start_off(self) -> Self:
        """Switch everything off, and return self."""
        self.phase = "off"
        return self

    @property
    def phase(self) -> str:
        """The named state of the three switches; "mixed" for a combination without a name."""
        switches = tuple(self.switches)
        return next((phase for phase, named in _SWITCHES.items() if named == switches), "mixed")

    @phase.setter
    def phase(self, phase: Phase) -> None:
        check_phase(phase)
        self.fake_quant_enabled, self.static_enabled, self.learning_enabled = _SWITCHES[phase]

    def enable_param_learning(self) -> Self:
        """Learn scale and zero point; the output is fake-quantized."""
        self.phase = "learn"
        return self

    def enable_static_estimate(self) -> Self:
        """Set scale and zero point from the observer; the output is fake-quantized."""
        self.phase = "estimate"
        return self

    def enable_static_observation(self) -> Self:
        """Observe only; the output is the input."""
        self.phase = "observe"
        return self

    def toggle_observer_update(self, enabled: bool = True) -> Self:
        """Switch observing on or off."""
        self.static_enabled = enabled
        return self

    def toggle_qparam_learning(self, enabled: bool = True) -> Self:
        """Switch the gradients of scale and zero point on or off."""
        self.learning_enabled = enabled
        return self

    def toggle_fake_quant(self, enabled: bool = True) -> Self:
        """Switch quantization of the output on or off."""
        self.fake_quant_enabled = enabled
        return self
