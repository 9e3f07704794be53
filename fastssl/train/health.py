"""What a run's records say about collapse, in words.

Beside its loss a method may return these scalars, as numbers or 0-d tensors; all are logged, and
those that are there are judged:

    std                   deviation of the normalised projections times sqrt(D), 1 over the sphere
    prototypes            K, where the loss is a mean cross-entropy over K prototypes
    prototype_loss        that cross-entropy, where the loss has further terms
    effective_prototypes  `ops.effective_prototypes` of the teacher's `ops.prototype_usage`, with
                          the bias of a centred teacher, without that of Sinkhorn
    student_temperature, teacher_temperature (Sinkhorn's epsilon)

The monitors' feature_std, of the features before any head, is judged for every method.
"""

import math
from typing import Any

COLLAPSED_STD = 0.2
"""`std` below this after warm-up (1 is healthy) means all projections are becoming equal; in it
that of a healthy run may fall as low."""
COLLAPSED_FEATURE_STD = 0.03
"""`feature_std` below this after warm-up: lower than of any random network that was met (0.07 for a
small transformer on digits; 0.5 to 0.8 for others)."""
FLAT_NATS = 0.01
"""A loss this near ln K is that of a student that finds all prototypes alike for every image,
whatever its teacher says."""
FEW_PROTOTYPES = 2.0
"""Fewer in use than this, or than half of K: most images are on one. No smaller share of K can be
expected, as a batch of B with sharp assignments uses at most B."""
LASTING_RECORDS, LASTING_STEPS = 10, 0.05
"""Prototypes are judged after warm-up, by so many records in a row over this share of all steps: a
healthy loss starts at ln K too, and features without training are nearly equal."""


def prototype_symptoms(
    loss: float,
    K: float,
    effective: float = math.inf,
    *,
    student_temperature: float | None = None,
    teacher_temperature: float | None = None,
) -> dict[str, str]:
    """What is wrong and what helps, by name of the symptom: "flat" and "few"; {} if nothing is.

    Args:
        loss: mean cross-entropy of the teacher's assignments with the student's, in nats.
        K: number of prototypes.
        effective: of these, those in use.
        student_temperature, teacher_temperature: where known, to be named in the advice.
    """
    found = {}
    than = "" if teacher_temperature is None else f" than {teacher_temperature:g}"
    if abs(loss - math.log(K)) < FLAT_NATS:
        found["flat"] = (
            f"the loss {loss:.4f} stays at ln {K:.0f} = {math.log(K):.4f}: the student finds all "
            "prototypes alike for every image. "
        )
        if None not in (student_temperature, teacher_temperature):
            if teacher_temperature >= student_temperature:
                found["flat"] += (
                    f"The teacher's temperature {teacher_temperature:g} must be below the "
                    f"student's {student_temperature:g}, or its assignments teach nothing sharper. "
                )
        found["flat"] += (
            f"Try a lower epsilon or teacher temperature{than} (0.03 has cured 0.05), prototypes "
            "frozen for the first epochs, or hard assignments; check that the features are "
            "L2-normalised and that no BatchNorm ends the head."
        )
    if effective < min(FEW_PROTOTYPES, K / 2):
        found["few"] = (
            f"the teacher puts most images on one prototype ({effective:.1f} of {K:.0f} in use). "
            f"Try a higher epsilon or teacher temperature{than}, more Sinkhorn iterations, or a "
            "centre that follows faster (momentum 0.9 to 0.99)."
        )
    return found


class Health:
    """Reads a run's records in order and says what is wrong, each symptom once."""

    def __init__(self, lr: float, warmup_steps: float, total_steps: int):
        self._lr, self._warmup, self._total = lr, warmup_steps, total_steps
        self._stretches: dict[str, tuple[int, int]] = {}  # symptom: its first step, its records
        self._said: set[str] = set()

    def messages(self, record: dict[str, Any]) -> list[str]:
        step, news = record["step"], {}
        std = record.get("std", 1.0)
        if step > self._warmup and std < COLLAPSED_STD:
            news["std"] = (
                f"the projections are collapsing (std {std:.3f}; 1 is healthy, below "
                f"{COLLAPSED_STD} is not): all images get nearly the same features. Try a lower lr "
                f"than {self._lr} or more warmup_epochs."
            )
        spread = record.get("feature_std", 1.0)
        if step > self._warmup and spread < COLLAPSED_FEATURE_STD:
            news["feature_std"] = (
                f"the features are collapsing (feature_std {spread:.3f}): the backbone gives "
                f"nearly the same for every image. Try a lower lr than {self._lr}, more "
                "warmup_epochs or less weight_decay, and look whether the loss has a term that "
                "keeps images apart."
            )
        symptoms = {}
        if "prototypes" in record and step > self._warmup:
            symptoms = prototype_symptoms(
                record.get("prototype_loss", record["loss"]),
                record["prototypes"],
                record.get("effective_prototypes", math.inf),
                student_temperature=record.get("student_temperature"),
                teacher_temperature=record.get("teacher_temperature"),
            )
        before, self._stretches = self._stretches, {}
        for what, text in symptoms.items():
            first, records = before.get(what, (step, 0))
            self._stretches[what] = first, records + 1
            if records + 1 >= LASTING_RECORDS and step - first >= LASTING_STEPS * self._total:
                news[what] = text
        unsaid = [what for what in news if what not in self._said]
        self._said |= {*unsaid}
        return [f"step {step}: {news[what]}" for what in unsaid]
