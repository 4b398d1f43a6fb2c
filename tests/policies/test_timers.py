"""The heap of deadlines against a dict."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hypeman.policies.timers import Timers

_actions = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.sampled_from("abcde"), st.integers(0, 50)),
        st.tuples(st.just("cancel"), st.sampled_from("abcde"), st.just(0)),
        st.tuples(st.just("pop"), st.just(""), st.integers(0, 50)),
    ),
    max_size=200,
)


@given(_actions)
def test_each_key_is_due_once_at_its_last_deadline(actions: list[tuple[str, str, int]]) -> None:
    timers: Timers[str] = Timers()
    model: dict[str, int] = {}
    for what, key, time in actions:
        match what:
            case "set":
                timers.set(key, time)
                model[key] = time
            case "cancel":
                timers.cancel(key)
                model.pop(key, None)
            case _:
                due = list(timers.pop_due(time))
                assert sorted(due) == sorted(key for key, deadline in model.items() if deadline <= time)
                assert [model[key] for key in due] == sorted(model[key] for key in due)
                for key in due:
                    del model[key]
        assert timers.next() == min(model.values(), default=None)
        assert len(timers) == len(model)
