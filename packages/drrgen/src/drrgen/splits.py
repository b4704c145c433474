"""Which patients are trained on, and which are kept for tests: by a rule on the patient's name and nothing else."""

import hashlib

from drrgen.errors import InputError

SPLITS = ("train", "val", "test")
RULES = ("hash", "lidc-idri-drr")

# The patients that SV-DRR was evaluated on: eval_patients.json of the published LIDC-IDRI-DRR.
PUBLISHED_TEST = frozenset(
    f"LIDC-IDRI-{number}"
    for number in "0030 0089 0163 0177 0251 0356 0376 0609 0671 0725 0755 0813 0830 0907 0952 0978".split()
)


def check_rule(rule: str) -> None:
    """Raises InputError where there is no such rule."""
    if rule not in RULES:
        raise InputError(f"--splits {rule!r} does not exist: choose one of {', '.join(RULES)}")


def split(patient_id: str, rule: str) -> str:
    """One of SPLITS, by a rule of docs/shard-schema.md (Splits). Raises InputError where there is no such rule."""
    check_rule(rule)
    h = int(hashlib.sha256(f"drr-sphere:{patient_id}".encode()).hexdigest()[:8], 16) / 2**32
    by_hash = "train" if h < 0.8 else "val" if h < 0.9 else "test"
    if rule == "hash":
        return by_hash
    return "test" if patient_id in PUBLISHED_TEST else "val" if by_hash == "val" else "train"
