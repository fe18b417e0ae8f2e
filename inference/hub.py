"""Where a model's files come from: a local folder, the embedded model, or the Hugging Face hub.

Files are fetched one by one, when they are needed; on the hub through ``huggingface_hub``, so its
cache, token, offline mode, resumed downloads and progress bars are those that its users know.
Every failure is a ModelError in words.
"""

import io
import re
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import huggingface_hub
from huggingface_hub import errors
from huggingface_hub.utils.tqdm import tqdm

from ..protocol.errors import ModelError
from ..protocol.manifest import SCHEME
from .progress import Progress, Step

DEMO = "demo"
"""The name of the model that comes with the package."""


class Source(Protocol):
    """Access to the files of one model."""

    name: str
    """What the user called the model."""

    @property
    def location(self) -> str:
        """What transformers' ``from_pretrained`` takes for it."""

    @property
    def local_only(self) -> bool:
        """Whether nothing can or need be downloaded."""

    @property
    def folder(self) -> Path:
        """Where its files are, or are kept when they were downloaded."""

    def find(self, filename: str) -> Path | None:
        """The local path of a file of the model, fetched if need be; None if it has none such."""

    def local(self, filename: str) -> Path | None:
        """The same, but nothing is fetched."""

    def missing(self, what: str) -> str:
        """Why ``what`` could not be had, after ``find`` has returned None."""


class FolderSource:
    """A folder in Hugging Face layout."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.location = str(folder)
        self.local_only = True
        self.folder = folder

    def find(self, filename: str) -> Path | None:
        """See ``Source``."""
        path = self.folder / filename
        return path if path.is_file() else None

    local = find

    def missing(self, what: str) -> str:
        """See ``Source``."""
        return f"the folder {self.folder} holds no {what}"


class FetchedSource:
    """A model from peers: its small files in a folder, its weights filed by content hash."""

    local_only = True

    def __init__(self, name: str, folder: Path, shards: Path) -> None:
        self.name = name
        self.location = str(folder)
        self.folder = shards
        self._folders = (folder, shards)

    def find(self, filename: str) -> Path | None:
        """See ``Source``."""
        paths = (folder / filename for folder in self._folders)
        return next((path for path in paths if path.is_file()), None)

    local = find

    def missing(self, what: str) -> str:
        """See ``Source``."""
        return f"{what} was not fetched from the swarm"


class GgufSource:
    """A GGUF file, which is a whole model (``gguf.py``)."""

    local_only = True

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path
        self.folder = path.parent
        self.location = str(path.parent)

    def find(self, filename: str) -> Path | None:
        """See ``Source``."""
        return self.path if filename == self.path.name else None

    local = find

    def missing(self, what: str) -> str:
        """See ``Source``."""
        return f"the file {self.path} holds no {what}"


class HubSource:
    """A model on the Hugging Face hub, such as ``bigscience/bloom-560m``."""

    def __init__(self, name: str, cache_dir: Path | None, progress: Progress | None = None) -> None:
        self.name = name
        self.location = name
        self._bar_class = None if progress is None else _bar_class(progress)
        self._cache_dir = cache_dir
        self.folder = cache_dir or Path(huggingface_hub.constants.HF_HUB_CACHE)
        self._unreachable = _why_unreachable(name)

    @property
    def local_only(self) -> bool:
        """See ``Source``."""
        return self._unreachable is not None

    def find(self, filename: str) -> Path | None:
        """See ``Source``. Without the hub, only the cache is looked at."""
        try:
            return Path(
                huggingface_hub.hf_hub_download(
                    self.name,
                    filename,
                    cache_dir=self._cache_dir,
                    local_files_only=self.local_only,
                    tqdm_class=self._bar_class,
                )
            )
        except errors.LocalEntryNotFoundError as error:
            self._unreachable = self._unreachable or str(error)
            return None
        except errors.EntryNotFoundError:
            return None
        except errors.GatedRepoError as error:
            raise ModelError(
                f"{self.name} is gated: accept its terms on the hub, then log in with "
                "`hf auth login` or set HF_TOKEN"
            ) from error
        except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
            raise ModelError(
                f"there is neither a folder {self.name!r} nor a model of that name on the hub "
                "(for a private model, log in with `hf auth login` or set HF_TOKEN)"
            ) from error
        # Transport, disk and cache fail with errors of several libraries, with no common class.
        except Exception as error:
            raise ModelError(f"{self.name}: cannot download {filename}: {error}") from error

    def local(self, filename: str) -> Path | None:
        """See ``Source``."""
        path = huggingface_hub.try_to_load_from_cache(
            self.name, filename, cache_dir=self._cache_dir
        )
        return Path(path) if isinstance(path, str) else None

    def missing(self, what: str) -> str:
        """See ``Source``."""
        if self._unreachable is None:
            return f"the hub has no {what}"
        return (
            f"there is no folder of that name, {what} is not in the hub's local cache, and "
            f"{self._unreachable}"
        )


def _bar_class(progress: Progress) -> type[tqdm]:
    """What the hub's library tells its downloads to, where it would draw bars of its own."""

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            options |= {"disable": False, "file": io.StringIO()}
            super().__init__(*args, **options)  # type: ignore[no-untyped-call]

        def display(self, *args: Any, **options: Any) -> None:
            del args, options
            progress(Step(f"downloading {self.desc}", self.n, self.total, "bytes"))

    return Bar


def _why_unreachable(name: str) -> str | None:
    """Ask the hub for the model once, without the retries that a download makes.

    None when it answers, whatever it says. So a misspelt path costs no half minute of retries on
    a machine without network.
    """
    if huggingface_hub.is_offline_mode():
        return "offline mode is on (HF_HUB_OFFLINE)"
    try:
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(name, "config.json"))
    except (errors.HfHubHTTPError, errors.FileMetadataError, errors.HFValidationError):
        return None  # an answer; the download will say what is wrong
    # The transport's errors share no class with the hub's.
    except Exception as error:  # noqa: BLE001
        return f"the hub could not be reached ({error})"
    return None


def open_source(name: str, *, cache_dir: Path | None, progress: Progress | None = None) -> Source:
    """The source that ``name`` means: ``demo``, an existing folder or GGUF file, or a hub id.

    Downloads are told to ``progress``; None: the hub's library draws bars of its own.
    """
    if name == DEMO:
        folder = resources.files(__package__) / "demo_model"
        if not isinstance(folder, Path) or not folder.is_dir():
            raise ModelError("this installation lacks the demo model; reinstall petals-node")
        return FolderSource(name, folder)
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return FolderSource(name, path)
        is_file = path.exists()
    except (OSError, RuntimeError) as error:  # too long, not permitted, no such home
        raise ModelError(f"the model folder {name!r} cannot be opened: {error}") from error
    if is_file:
        if path.suffix == ".gguf":
            return GgufSource(name, path)
        raise ModelError(
            f"{name} is a file; give the folder that holds the model's config.json and weights, "
            "or a GGUF file"
        )
    if name.startswith(SCHEME):
        raise ModelError(
            f"the model {name} is fetched from peers by a node; here, give demo, the path of a model "
            "folder or GGUF file, or a hub id"
        )
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII):
        raise ModelError(
            f"there is no folder {name!r}; give demo, the path of a model folder or GGUF file, "
            "or a hub id such as bigscience/bloom-560m"
        )
    return HubSource(name, cache_dir, progress)
