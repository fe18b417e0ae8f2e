"""Keys and holders, beside a dumb twin, and the rules for what is retained."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from petals.inference.prefix_store import PrefixStore
from petals.protocol.prefix import PREFIX_ROWS


def keys(text: str) -> list[bytes]:
    """One key for every letter: that of the text up to it."""
    return [text[: end + 1].encode() for end in range(len(text))]


def label(store: PrefixStore[str], holder: str, text: str) -> None:
    for count, key in enumerate(keys(text), start=1):
        store.label(holder, PREFIX_ROWS * count, key)


def retained(store: PrefixStore[str], holder: str, text: str, room: int = 100) -> bool:
    label(store, holder, text)
    return store.retain(holder, PREFIX_ROWS * room)


def test_the_longest_known_prefix_is_found() -> None:
    store = PrefixStore[str]()
    label(store, "one", "abc")
    label(store, "two", "abcde")
    assert store.find(keys("abcdx")) == ("two", 4 * PREFIX_ROWS)
    assert store.find(keys("abcxx")) == ("one", 3 * PREFIX_ROWS)
    assert store.find(keys("xbc")) is None
    assert store.find([]) is None


def test_a_key_counts_only_at_its_position() -> None:
    store = PrefixStore[str]()
    store.label("one", 2 * PREFIX_ROWS, b"key")
    assert store.find([b"key"]) is None
    assert store.find([b"", b"key"]) == ("one", 2 * PREFIX_ROWS)


def test_a_rewind_takes_off_the_labels_above_it() -> None:
    store = PrefixStore[str]()
    label(store, "one", "abcd")
    store.cut("one", 3 * PREFIX_ROWS - 1)
    assert store.find(keys("abcd")) == ("one", 2 * PREFIX_ROWS)
    store.label("one", 3 * PREFIX_ROWS, b"abx")
    assert store.find(keys("abcd")) == ("one", 2 * PREFIX_ROWS)
    assert store.find(keys("abx")) == ("one", 3 * PREFIX_ROWS)
    store.cut("one", 0)
    assert store.labelled("one") == 0 and store.find(keys("a")) is None


def test_what_is_retained_outlives_its_session_and_the_least_recently_used_goes_first() -> None:
    store = PrefixStore[str]()
    assert retained(store, "one", "ab") and retained(store, "two", "cd")
    assert retained(store, "three", "ef")
    assert store.tokens == 6 * PREFIX_ROWS
    assert store.find(keys("abx")) == ("one", 2 * PREFIX_ROWS)  # used: to the front
    store.shrink(5 * PREFIX_ROWS)
    assert store.find(keys("cd")) is None
    store.shrink(2 * PREFIX_ROWS)
    assert store.find(keys("ef")) is None
    assert store.find(keys("ab")) == ("one", 2 * PREFIX_ROWS)
    assert store.tokens == 2 * PREFIX_ROWS


def test_the_newest_makes_room_for_itself_unless_it_does_not_fit_at_all() -> None:
    store = PrefixStore[str]()
    assert retained(store, "one", "ab", room=4) and retained(store, "two", "cd", room=4)
    assert retained(store, "three", "efg", room=4)
    assert store.find(keys("ab")) is None and store.find(keys("cd")) is None
    assert not retained(store, "large", "hijkl", room=4)
    assert store.find(keys("h")) is None
    assert store.find(keys("efg")) == ("three", 3 * PREFIX_ROWS)


def test_a_session_without_labels_is_not_retained() -> None:
    store = PrefixStore[str]()
    assert not store.retain("one", 1000)
    assert store.tokens == 0


def test_a_prefix_of_another_is_dropped_whichever_comes_first() -> None:
    for order in (("ab", "abcd"), ("abcd", "ab"), ("abcd", "abcd")):
        store = PrefixStore[str]()
        for number, text in enumerate(order):
            retained(store, f"{number}", text)
        assert store.tokens == 4 * PREFIX_ROWS
        assert store.find(keys("ab")) is not None
        assert store.find(keys("abcd")) is not None


def test_the_retained_one_of_two_holders_is_used() -> None:
    store = PrefixStore[str]()
    label(store, "live", "ab")
    retained(store, "old", "abc")
    retained(store, "other", "x")
    assert store.find(keys("ab")) == ("old", 2 * PREFIX_ROWS)
    store.shrink(3 * PREFIX_ROWS)
    assert store.find(keys("x")) is None, "it was used less recently"
    store.shrink(0)
    assert store.find(keys("ab")) == ("live", 2 * PREFIX_ROWS)


class StoreMachine(RuleBasedStateMachine):
    """A store beside a twin that keeps whole texts: live ones, and retained ones in order of use.

    A text is at most 4 letters of 2, so that sessions meet.
    """

    def __init__(self) -> None:
        super().__init__()
        self.store = PrefixStore[int]()
        self.live: dict[int, str] = {}
        self.kept: dict[int, str] = {}
        self.next = 0

    @rule(text=st.text("ab", max_size=4))
    def open(self, text: str) -> None:
        self.live[self.next] = text
        for count, key in enumerate(keys(text), start=1):
            self.store.label(self.next, PREFIX_ROWS * count, key)
        self.next += 1

    @precondition(lambda self: self.live)
    @rule(data=st.data(), end=st.integers(0, 4), more=st.text("ab", max_size=2))
    def rewind_and_go_on(self, data: st.DataObject, end: int, more: str) -> None:
        holder = data.draw(st.sampled_from(sorted(self.live)))
        self.live[holder] = self.live[holder][:end]
        self.store.cut(holder, end * PREFIX_ROWS + PREFIX_ROWS // 2)
        for letter in more:
            text = self.live[holder] = self.live[holder] + letter
            self.store.label(holder, PREFIX_ROWS * len(text), text.encode())

    @precondition(lambda self: self.live)
    @rule(data=st.data(), room=st.integers(0, 12))
    def close(self, data: st.DataObject, room: int) -> None:
        holder = data.draw(st.sampled_from(sorted(self.live)))
        text = self.live.pop(holder)
        held = any(other.startswith(text) for other in self.kept.values())
        expected = bool(text) and len(text) <= room and not held
        assert self.store.retain(holder, room * PREFIX_ROWS) == expected
        if expected:
            self.kept = {h: t for h, t in self.kept.items() if not text.startswith(t)}
            self.kept[holder] = text
            self._shrink(room)

    @rule(room=st.integers(0, 12))
    def shrink(self, room: int) -> None:
        self.store.shrink(room * PREFIX_ROWS)
        self._shrink(room)

    def _shrink(self, room: int) -> None:
        while sum(map(len, self.kept.values())) > room:
            del self.kept[next(iter(self.kept))]

    @precondition(lambda self: self.live or self.kept)
    @rule(data=st.data(), position=st.integers(0, 4))
    def give_up(self, data: st.DataObject, position: int) -> None:
        holder = data.draw(st.sampled_from(sorted(self.live | self.kept)))
        expected = len(self.kept.get(holder, "too long")) <= position + 1
        assert self.store.give_up(holder, position * PREFIX_ROWS) == expected
        if expected:
            del self.kept[holder]

    @rule(text=st.text("ab", min_size=1, max_size=5))
    def find(self, text: str) -> None:
        everything = [*self.live.values(), *self.kept.values()]
        known = [end for end in range(1, 6) if any(t.startswith(text[:end]) for t in everything)]
        found = self.store.find(keys(text))
        longest = max((end for end in known if end <= len(text)), default=0)
        if not longest:
            assert found is None
            return
        assert found is not None
        holder, position = found
        assert position == longest * PREFIX_ROWS
        assert (self.kept | self.live)[holder].startswith(text[:longest])
        if any(kept.startswith(text[:longest]) for kept in self.kept.values()):
            self.kept[holder] = self.kept.pop(holder)

    @invariant()
    def tokens_are_those_of_what_is_kept(self) -> None:
        assert self.store.tokens == PREFIX_ROWS * sum(map(len, self.kept.values()))


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=60, stateful_step_count=30)


@given(texts=st.lists(st.text("ab", max_size=3), max_size=6))
def test_nothing_stays_of_what_is_forgotten(texts: list[str]) -> None:
    store = PrefixStore[int]()
    for holder, text in enumerate(texts):
        for count, key in enumerate(keys(text), start=1):
            store.label(holder, PREFIX_ROWS * count, key)
    for holder in range(len(texts)):
        store.forget(holder)
    assert all(store.find(keys(text)) is None for text in texts)
    assert (store._labels, store._holders, store._retained) == ({}, {}, {})
