"""The XML that routers send, read without its dangers.

Rules of this file: a document has no DOCTYPE, and so no entities that grow; names count without their
namespaces, which routers get wrong; whatever cannot be read is a ``RouterError``.
"""

from collections.abc import Iterator
from xml.etree.ElementTree import Element, ParseError, TreeBuilder, XMLParser

from .errors import RouterError


class _NoDoctype(TreeBuilder):
    """Stops at the declaration, before anything that it declares is read."""

    def doctype(self, *_: str | None) -> None:
        raise RouterError("its XML has a DOCTYPE, which we do not read")


def parsed(document: bytes) -> Element:
    """The root of a document. Raises RouterError."""
    parser = XMLParser(target=_NoDoctype())  # noqa: S314 - what makes XML dangerous is refused
    try:
        parser.feed(document)
        root = parser.close()
    except (ParseError, LookupError, ValueError) as error:
        raise RouterError(f"its XML cannot be read ({error})") from error
    assert isinstance(root, Element)
    return root


def named(root: Element, name: str) -> Iterator[Element]:
    """All elements of that name, at whatever depth."""
    return (element for element in root.iter() if _local(element) == name)


def text_of(root: Element, name: str) -> str:
    """What the first element of that name says; "" if there is none."""
    return next(((element.text or "").strip() for element in named(root, name)), "")


def _local(element: Element) -> str:
    return element.tag.rpartition("}")[2]
