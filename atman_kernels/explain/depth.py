"""How much of an explanation is computed: which rows feel a suppression, which units are run exactly or opened."""

from dataclasses import dataclass

from atman_kernels.arguments import count_or_none
from atman_kernels.errors import InputError
from atman_kernels.explain.methods import WITH_RECOMPUTE, Method
from atman_kernels.hf.models.tasks import Task
from atman_kernels.inputs.tasks import CAUSAL


@dataclass(frozen=True)
class Depth:
    """`recompute`, `exact` and `refine` of `Explainer.explain`."""

    recompute: int | None = None
    exact: int | None = None
    refine: int | None = None

    @classmethod
    def checked(
        cls,
        recompute: object,
        exact: object,
        method: Method,
        task: Task,
        *,
        refine: object = None,
        nested: bool = False,
    ) -> "Depth":
        """Raises InputError if one of them does not fit, or does not go with the rest."""
        depth = cls(
            count_or_none(recompute, "recompute"), count_or_none(exact, "exact"), count_or_none(refine, "refine")
        )
        for name, value in (("recompute", recompute), ("exact", exact)):
            if value is not None and task != CAUSAL:
                raise InputError(
                    f"{name} is for causal language models, whose variants share keys and values; with {task} every "
                    "variant is a full row"
                )
        if recompute is not None and exact is not None:
            raise InputError("recompute and exact do not go together: exact units recompute all that changes")
        if recompute is not None and method.name not in WITH_RECOMPUTE:
            raise InputError(f"method with recompute must be one of {', '.join(WITH_RECOMPUTE)}, got {method.name!r}")
        if exact is not None and method.name != "atman":
            raise InputError(f"method with exact must be 'atman', got {method.name!r}")
        if nested and method.name != "atman":
            raise InputError(f"method with nested units must be 'atman', got {method.name!r}")
        if nested and exact is not None:
            raise InputError("exact does not go with nested units, which are all exact; refine says how many are cut")
        if refine is not None and not nested:
            raise InputError("refine is for nested units, such as units=('paragraph', 'sentence', 'word')")
        return depth
