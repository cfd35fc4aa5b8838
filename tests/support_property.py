"""Hypothesis, where it is installed; where it is not, its tests are skipped and the others run."""

from __future__ import annotations

from typing import Any

from support import needs

try:
    import hypothesis.strategies as st
    from hypothesis import HealthCheck, example, given, settings
except ImportError:  # its tests are skipped then, the others run

    class _Absent:
        """Takes any use of hypothesis while this module is loaded; decorates nothing."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any, **options: Any) -> Any:
            is_test = args and getattr(args[0], "__name__", "").startswith(("test_", "skipped"))
            return args[0] if is_test else self

        def __or__(self, other: Any) -> Any:
            return self

    def given(*args: Any, **options: Any) -> Any:
        def replace(test: Any) -> Any:
            def skipped() -> None:
                needs("hypothesis")

            skipped.__name__ = test.__name__
            return skipped

        return replace

    st = HealthCheck = settings = example = _Absent()


PROPERTY = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=8)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner,
                                                                max_size=4),
    max_leaves=12,
)  # fmt: skip
