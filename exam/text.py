"""The text of a task: one function per source, each yielding (text, held_out) in a fixed order.

pycode is this machine's Python files, climbmix and tinystories come from the Hugging Face hub, and an own text from the
files of its owner. What becomes of the text is for rows.py.
"""

import contextlib
import functools
import gzip
import hashlib
import importlib
import itertools
import json
import shutil
import sysconfig
import threading
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from exam import limits
from prepare import Trouble, cache_root, one_line


def python_files():
    """Yield (path, hidden) of the Python files of the standard library and of four packages that are always there.

    hidden: the file lies in a folder of tests, which no running program imports. Validation text comes from hidden
    files alone, so that the sandbox can close their folders.
    """
    packages = [importlib.import_module(name) for name in ("torch", "numpy", "sympy", "networkx")]
    for root in [sysconfig.get_paths()["stdlib"], *(package.__path__[0] for package in packages)]:
        root = Path(root).resolve()
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).parts[:-1]
            if "site-packages" not in parts and path.is_file():
                yield path, "test" in parts or "tests" in parts


def hidden_folders():
    """The folders of pycode's hidden files."""
    return sorted({str(path.parent) for path, hidden in python_files() if hidden})


def pycode_documents():
    """Yield (text, held_out) for each distinct Python file, ordered by the hash of its content.

    Validation files are a tenth, chosen by that hash, of the hidden ones.
    """
    found = {}
    for path, hidden in python_files():
        content = path.read_bytes()
        if len(content) >= 128:
            found.setdefault(hashlib.sha256(content).digest(), (hidden, content))
    for digest, (hidden, content) in sorted(found.items()):
        with contextlib.suppress(UnicodeDecodeError):
            yield content.decode("utf-8"), hidden and digest[-1] % 10 == 0


def pycode_source():
    """The text of pycode as `build` takes it."""
    found = list(pycode_documents())
    return lambda: found, len(found), {"hidden_folders": hidden_folders()}


@contextlib.contextmanager
def open_parquet(path):
    """The parquet file at `path`; raises Trouble where it is damaged or has no text."""
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            if not any(field.name == "text" and "string" in str(field.type) for field in file.schema_arrow):
                raise Trouble(f"{path} has no column 'text' of strings")
            yield file
    except (ArrowException, OSError) as error:
        raise Trouble(f"{path} is damaged ({one_line(error, 200)}); delete or replace it, then start again") from None


def parquet_texts(path):
    """Yield the column "text" of a parquet file, with a thousand documents at a time in memory; None becomes ""."""
    with open_parquet(path) as file:
        for batch in file.iter_batches(1024, columns=["text"]):
            yield from (text or "" for text in batch.column(0).to_pylist())


HUB = {"climbmix": "karpathy/climbmix-400b-shuffle", "tinystories": "karpathy/tinystories-gpt4-clean"}


def hub_source(dataset, shards):
    """Fetch a dataset of the Hugging Face hub and return it as `build` takes it."""
    if dataset == "climbmix":  # its validation shard is the one that upstream uses
        names = [f"shard_{number:05d}.parquet" for number in (6542, *range(shards))]
    else:
        names = ["tinystories_gpt4_clean.parquet"]
    folder = cache_root() / "hub" / dataset
    commit = download(HUB[dataset], names, folder)
    counts = []
    for name in names:
        with open_parquet(folder / name) as file:
            counts.append(file.metadata.num_rows)
    # The card of tinystories sets the first 20,000 stories aside for test and validation.
    held_out = counts[0] if dataset == "climbmix" else 20_000

    def documents():
        texts = itertools.chain.from_iterable(parquet_texts(folder / name) for name in names)
        return ((text, number < held_out) for number, text in enumerate(texts))

    return documents, sum(counts), {"source": {"repository": HUB[dataset], "commit": commit, "files": names}}


def download(repository, names, folder):
    """Fetch files of a dataset repository into `folder`, eight at a time, and return the commit that they are of.

    Complete files are not fetched again. huggingface_hub shows the progress, resumes broken connections and waits out
    rate limits.
    """
    from huggingface_hub import hf_hub_download

    get = functools.partial(hf_hub_download, repository, repo_type="dataset", local_dir=folder)
    todo, errors = iter(names), []

    def work():
        for name in todo:
            try:
                get(name)
            except Exception as error:
                errors.append(error)
            if errors:
                return

    try:
        first = get(names[0], dry_run=True)
        get = functools.partial(get, revision=first.commit_hash)
        with ThreadPoolExecutor(8) as pool:
            files = [first, *pool.map(lambda name: get(name, dry_run=True), names[1:])]
    except Exception as error:
        raise download_trouble(error, repository) from None
    for leftover in folder.rglob("*.incomplete"):  # of a download that was killed
        leftover.unlink()
    missing = sum(file.file_size for file in files if file.will_download)
    # Rows take up to twice the download.
    size = missing + 2 * sum(file.file_size for file in files) + limits.DISK_RESERVE
    if size > (free := shutil.disk_usage(cache_root()).free):
        raise Trouble(
            f"this needs {size / 1e9:.1f} GB in {cache_root()}, where {free / 1e9:.1f} GB are free; "
            "make room, take fewer --shards, or choose another folder with AUTORESEARCH_CACHE"
        )
    if missing:
        print(f"fetching {missing / 1e9:.1f} GB from {repository}", flush=True)
    # Threads that die with the program: Ctrl-C does not wait for the end of a file.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise download_trouble(errors[0], repository)
    return first.commit_hash


def download_trouble(error, repository):
    """Trouble that says what a failure of huggingface_hub is and where to look."""
    while getattr(error, "response", None) is None and error.__cause__:
        error = error.__cause__
    return Trouble(
        f"cannot fetch {repository} ({one_line(error, 300)}); look at the network, HF_ENDPOINT, HF_HUB_OFFLINE, "
        "HTTPS_PROXY and HF_TOKEN, then run the same command again: it goes on with the file that is missing"
    )


KINDS = (".txt", ".md", ".rst", ".jsonl", ".txt.gz", ".md.gz", ".rst.gz", ".jsonl.gz", ".parquet")


def text_files(paths):
    """The real paths of the text files at or below `paths`, sorted; names with a leading dot are left out."""
    found = set()
    for path in map(Path, paths):
        below = [file for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
        below = [file for file in below if file.name.endswith(KINDS) and "/." not in f"/{file.relative_to(path)}"]
        if not below:
            raise Trouble(f"there is no file at or below {path} whose name ends with one of {' '.join(KINDS)}")
        found.update(file.resolve() for file in below)
    return sorted(found)


def pieces(file, size=2**14):
    """Yield an open text file in documents of about `size` characters, cut at a blank line, else line, if there is one.

    A book or a dump of many texts in one file becomes documents that can be split into training and validation.
    """
    text = file.read(size)
    while more := file.read(size):
        end = text.rfind("\n\n") + 2 if "\n\n" in text else text.rfind("\n") + 1 or len(text)
        yield text[:end]
        text = text[end:] + more
    yield text


def read_texts(path):
    """Yield the documents of one text file; "" for a line of .jsonl that has none."""
    if path.name.endswith(".parquet"):
        yield from parquet_texts(path)
        return
    opened = gzip.open if path.name.endswith(".gz") else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", errors="replace") as file:
            if ".jsonl" not in path.suffixes[-2:]:
                yield from pieces(file)
                return
            for line in file:
                text = None
                with contextlib.suppress(ValueError, RecursionError, TypeError, KeyError):
                    text = json.loads(line)["text"]
                yield text if isinstance(text, str) else ""
    except (OSError, EOFError, zlib.error) as error:
        raise Trouble(f"{path} cannot be read to its end ({error})") from None


def text_documents(files, share, left_out=None):
    """Yield (text, held_out) of the user's files without what is nearly empty, not text, or there already.

    share: of the documents that is held out, chosen by a hash of the content. left_out: a Counter of the reasons why
    something is not yielded.
    """
    left_out, seen = Counter() if left_out is None else left_out, set()
    for path in files:
        try:
            for text in read_texts(path):
                content = text.strip()
                digest = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest()
                number = int.from_bytes(digest, "little")
                if len(content) < 16:
                    left_out["nearly empty"] += 1
                elif "\ufffd" in content or "\0" in content:
                    left_out["not UTF-8"] += 1
                elif number in seen:
                    left_out["duplicate"] += 1
                else:
                    seen.add(number)
                    yield text, number < share * 2**64
        except Trouble as trouble:
            left_out[str(trouble)] += 1
