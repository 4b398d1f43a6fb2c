"""Layers applied to the tree in memory: the rules beside each other, without a disk."""

from __future__ import annotations

import tarfile
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypeman.images.layers import LayerError, Sink, Tree
from hypeman.images.nodes import Directory, Node, Shelf
from hypeman.images.tar import Entry, Source, TarError, TarReader
from tests.images.layout import directory, entry, hard_link, symlink, tar
from tests.images.trees import make_disk


class Keep(Sink):
    """Keeps the data of files, and knows which are wanted."""

    def __init__(self) -> None:
        self.wanted: set[int] = set()

    def store(self, node: Node, entry: Entry, read: Callable[[int], bytes]) -> None:
        node.content = [read(entry.stored)]
        self.wanted.add(id(node))

    def discard(self, node: Node) -> None:
        self.wanted.discard(id(node))


def apply(*layers: bytes) -> tuple[dict[str, object], Tree, Keep]:
    tree, sink = Tree(max_entries=1000), Keep()
    for layer in layers:
        tree.apply(TarReader(Source(iter([layer]))), sink)
    return paths(tree), tree, sink


def paths(tree: Tree) -> dict[str, object]:
    """path → content of a file, target of a link, None for a directory."""
    found: dict[str, object] = {}

    def visit(node: Directory, path: str) -> None:
        for name, child in node.children.items():
            here = f"{path}/{name.decode()}".lstrip("/")
            if isinstance(child, Directory):
                found[here] = None
                visit(child, here)
            elif isinstance(child.content, list):
                found[here] = child.content[0]
            else:
                found[here] = child.content

    visit(tree.root, "")
    return found


def test_parents_are_made() -> None:
    found, tree, _ = apply(tar(entry("a/b/c", data=b"1")))
    assert found == {"a": None, "a/b": None, "a/b/c": b"1"}
    assert tree.root.children[b"a"].mode & 0o7777 == 0o755


def test_a_whiteout_spares_its_own_layer() -> None:
    """Whatever the order in the archive."""
    base = tar(directory("d"), entry("d/old", data=b"o"), entry("x", data=b"old"))
    for upper in (
        tar(entry("d/new", data=b"n"), entry("d/.wh..wh..opq"), entry("x", data=b"new"), entry(".wh.x")),
        tar(entry("d/.wh..wh..opq"), entry("d/new", data=b"n"), entry(".wh.x"), entry("x", data=b"new")),
    ):
        assert apply(base, upper)[0] == {"d": None, "d/new": b"n", "x": b"new"}


def test_a_whiteout_and_a_link_to_what_it_hides() -> None:
    """A file moved: its new name is a hard link, its old one is whited out."""
    found, _, sink = apply(tar(entry("old", data=b"1")), tar(hard_link("new", "old"), entry(".wh.old")))
    assert found == {"new": b"1"} and len(sink.wanted) == 1


def test_an_opaque_directory_keeps_what_was_linked_into_it() -> None:
    base = tar(directory("d"), entry("d/old", data=b"o"), entry("f", data=b"1"))
    found, _, _ = apply(base, tar(hard_link("d/linked", "f"), entry("d/.wh..wh..opq")))
    assert found == {"d": None, "d/linked": b"1", "f": b"1"}


def test_a_link_to_something_inside_of_what_it_replaces() -> None:
    found, _, sink = apply(tar(directory("d"), entry("d/f", data=b"1")), tar(hard_link("d", "d/f")))
    assert found == {"d": b"1"} and len(sink.wanted) == 1


def test_data_of_hard_links_goes_with_the_last_name() -> None:
    base = tar(entry("a", data=b"1"), hard_link("b", "a"))
    assert len(apply(base, tar(entry(".wh.a")))[2].wanted) == 1
    assert len(apply(base, tar(entry(".wh.a"), entry(".wh.b")))[2].wanted) == 0


def test_aufs_leftovers_are_ignored() -> None:
    assert apply(tar(directory(".wh..wh.plnk"), entry(".wh..wh.aufs"), entry("x")))[0] == {"x": b""}


def test_entries_are_counted_down_too() -> None:
    """An image may replace its files in every layer without running out."""
    layers = [tar(*(entry(f"{n}") for n in range(400))) for _ in range(4)]
    _, tree, _ = apply(*layers)
    assert tree.entries == 400
    with pytest.raises(LayerError, match="more than the 1000"):
        apply(tar(*(entry(f"{n}") for n in range(1001))))


def test_endless_whiteouts_end() -> None:
    """What was pruned is not looked at again: 300 directories inside each other, all opaque, many times over."""
    deep = "/".join("d" for _ in range(300))
    names = [deep[: 2 * n + 1] for n in range(300)]
    base = tar(directory(deep), *(entry(f"d/{n}") for n in range(900)))
    tree, sink = Tree(max_entries=3000), Keep()
    visits = 0
    for layer in (base, tar(*(entry(f"{name}/.wh..wh..opq") for name in names * 3), directory("d"))):
        tree.apply(TarReader(Source(iter([layer])), max_entries=10_000), sink)
    original = Tree._prune

    def counted(self, items, *rest):  # type: ignore[no-untyped-def]
        nonlocal visits
        visits += len(items)
        original(self, items, *rest)

    Tree._prune = counted  # type: ignore[method-assign]
    try:
        many = tar(*(entry(f"e/{n}") for n in range(900)), *(entry("e/.wh..wh..opq") for _ in range(500)))
        tree.apply(TarReader(Source(iter([many])), max_entries=10_000), sink)
    finally:
        Tree._prune = original  # type: ignore[method-assign]
    assert visits <= 900
    assert set(paths(tree)) == {"d", "e", *(f"e/{n}" for n in range(900))}


def test_errors_name_the_entry() -> None:
    with pytest.raises(LayerError, match=r"^entry 'a/\\xff' lies below 'a', which is not a directory$"):
        apply(tar(entry("a"), entry("a/\udcff")))


NAME = st.sampled_from(["a", "b", "c", "a/a", "a/b", "b/a", "a/b/c", "c/a", ".wh.a", "a/.wh.b", "b/.wh..wh..opq", "./"])
MEMBER = st.one_of(
    st.builds(lambda name, size: entry(name, data=b"x" * size), NAME, st.sampled_from([0, 1, 5000, 70_000])),
    st.builds(directory, NAME),
    st.builds(symlink, NAME, st.sampled_from(["a", "b/a", "../..", "/c", "."])),
    st.builds(hard_link, NAME, NAME),
    st.builds(lambda name: entry(name, tarfile.FIFOTYPE), NAME),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(MEMBER, max_size=8), max_size=3))
def test_any_layers(layers: list[list[tuple[tarfile.TarInfo, bytes]]]) -> None:
    """Whatever layers say, the tree stays a tree: counted right, links counted right, no data kept or lost."""
    archives = [tar(*members) for members in layers]
    try:
        _, tree, sink = apply(*archives)
    except TarError:
        return
    nodes = list(tree.walk())
    assert tree.entries == len(nodes)
    for parent, name, node in nodes:
        assert parent.children[name] is node
        assert isinstance(node, Directory) or node.links == sum(other is node for _, _, other in nodes)
    assert {id(node) for _, _, node in nodes if isinstance(node.content, list)} == sink.wanted
    disk = make_disk(archives)
    assert disk[1024:1028] == b"\xe2\xe1\xf5\xe0"
    assert make_disk(archives, enough=0) == disk, "packed away at every chance, the tree became another one"


def test_packing_is_paid_for() -> None:
    """Two large directories in turn: files are not packed and unpacked for each entry."""
    base = tar(*(entry(f"{directory}/{n}") for directory in "ab" for n in range(1000)))
    turns = tar(*(entry(f"{'ab'[n % 2]}/{n}") for n in range(1000)))
    tree = Tree(max_entries=5000, enough=100)
    packings = 0
    pack = Shelf.pack

    def counted(self: Shelf, *, besides: Directory | None = None) -> None:
        nonlocal packings
        packings += 1
        pack(self, besides=besides)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shelf, "pack", counted)
        for layer in (base, turns):
            tree.apply(TarReader(Source(iter([layer]))), Empty())
    assert 5 < packings < 40
    assert tree.entries == 2002


class Empty(Sink):
    """For files without data."""

    def store(self, node: Node, entry: Entry, read: Callable[[int], bytes]) -> None:
        pass

    def discard(self, node: Node) -> None:
        pass
