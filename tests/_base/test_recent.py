"""The values that were used last."""

from __future__ import annotations

from onnxcop._base.lookup import Recent


def test_what_was_not_used_for_longest_makes_room_before_another_is_made() -> None:
    ended: list[str] = []
    kept: Recent[int, str] = Recent(2, ended.append)

    def made(key: int) -> str:
        assert len(kept) < 2
        return f"made {key}"

    assert [kept.get(key, lambda key=key: made(key)) for key in (1, 2)] == ["made 1", "made 2"]
    assert kept.get(1, lambda: "again") == "made 1"
    assert kept.get(3, lambda: made(3)) == "made 3"
    assert ended == ["made 2"]
    assert sorted(kept.values()) == ["made 1", "made 3"]
