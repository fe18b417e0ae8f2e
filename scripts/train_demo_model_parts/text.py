"""The demo model's text: two Bibles, cleaned, tokenized, cut into batches."""

from __future__ import annotations

import random
import re
import subprocess
from collections.abc import Iterator

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PACKAGES = "bible-kjv diatheke sword-text-web"
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>"]
VOCABULARY = 4096
SEQUENCE = 256  # trained on
CONTEXT = 2048  # written in the configuration; ALiBi itself has no limit
BATCH = 16
HELD_OUT = 1 / 40

# The books both translations hold, in their common order, as the World English Bible names them.
SHARED_BOOKS = """Genesis,Exodus,Leviticus,Numbers,Deuteronomy,Joshua,Judges,Ruth,I Samuel,II Samuel,
I Kings,II Kings,I Chronicles,II Chronicles,Ezra,Nehemiah,Esther,Job,Psalms,Proverbs,Ecclesiastes,
Song of Solomon,Isaiah,Jeremiah,Lamentations,Ezekiel,Daniel,Hosea,Joel,Amos,Obadiah,Jonah,Micah,
Nahum,Habakkuk,Zephaniah,Haggai,Zechariah,Malachi,Matthew,Mark,Luke,John,Acts,Romans,I Corinthians,
II Corinthians,Galatians,Ephesians,Philippians,Colossians,I Thessalonians,II Thessalonians,
I Timothy,II Timothy,Titus,Philemon,Hebrews,James,I Peter,II Peter,I John,II John,III John,Jude,
Revelation of John""".replace("\n", "").split(",")
# Found in the World English Bible only. Left out: books that retell a shared one almost verbatim
# (the Greek Esther, I Esdras), since their text would leak held-out chapters into training.
OTHER_BOOKS = """Tobit,Judith,Wisdom,Sirach,Baruch,I Maccabees,II Maccabees,Prayer of Manasses,
Additional Psalm,III Maccabees,II Esdras,IV Maccabees""".replace("\n", "").split(",")
EDITORIAL_LENGTH = 1200  # no verse is that long; a preface or glossary stuck to one is

Chapter = tuple[str, int]  # book, number
Chapters = dict[Chapter, str]


def output_of(*command: str) -> str:
    """What a command prints."""
    try:
        return subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout
    except FileNotFoundError:
        raise SystemExit(f"{command[0]} is missing: apt-get install {PACKAGES}") from None


def joined(verses: Iterator[tuple[str, int, str]]) -> Chapters:
    """Verses to chapters, one paragraph each."""
    chapters: dict[Chapter, list[str]] = {}
    for book, number, text in verses:
        chapters.setdefault((book, number), []).append(" ".join(text.split()))
    return {chapter: " ".join(filter(None, texts)) for chapter, texts in chapters.items()}


def king_james() -> Chapters:
    """The King James Version's chapters."""

    def verses() -> Iterator[tuple[str, int, str]]:
        books: dict[str, str] = {}
        for line in output_of("bible", "-f", "gen1:1-rev22:21").splitlines():
            if found := re.fullmatch(r"(\d?[A-Za-z]+?)(\d+):\d+ (.*)", line):
                abbreviation, number, text = found.groups()
                if abbreviation not in books:
                    books[abbreviation] = SHARED_BOOKS[len(books)]
                yield books[abbreviation], int(number), text

    return joined(verses())


def world_english() -> Chapters:
    """The World English Bible's chapters, with those of the books only it holds."""
    reference = re.compile(rf"\b({'|'.join(SHARED_BOOKS + OTHER_BOOKS)}) (\d+):\d+: (.*)")
    ascii_marks = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "—": " - "})
    modules = output_of("diatheke", "-b", "system", "-k", "modulelist")
    module = re.search(r"^(\S+) : World English Bible", modules, re.MULTILINE)
    if module is None:
        raise SystemExit(f"the World English Bible is missing: apt-get install {PACKAGES}")

    def verses() -> Iterator[tuple[str, int, str]]:
        text = output_of("diatheke", "-b", module[1], "-f", "OSIS", "-k", "Gen 1-Rev 22")
        for line in text.splitlines():
            if found := reference.search(line):  # psalm titles, repeated on every line, precede it
                book, number, marked = found.groups()
                spaced = re.sub(r"(</w>[,;:.]?)(?=<w\b)", r"\1 ", marked)  # a footnote stood there
                plain = re.sub(r"<[^>]*>", "", spaced).translate(ascii_marks)
                plain = re.sub(r"(?<=[a-z])(?=Yahweh|Jesus)", " ", plain)
                if len(plain) < EDITORIAL_LENGTH:
                    yield book, int(number), plain

    return joined(verses())


def split_text(seed: int) -> tuple[list[str], list[str]]:
    """Chapters to train on and chapters held out, the same ones in both translations."""
    kjv, web = king_james(), world_english()
    held_out = set(random.Random(seed).sample(sorted(kjv), round(len(kjv) * HELD_OUT)))
    both = [*kjv.items(), *web.items()]
    train = [text for chapter, text in both if chapter not in held_out]
    return train, [text for chapter, text in both if chapter in held_out]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with BLOOM's special tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(texts, trainer)
    unknown, begin, end, padding = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        bos_token=begin,
        eos_token=end,
        pad_token=padding,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[torch.Tensor]:
    """Documents, each closed by the end token."""
    end = tokenizer.eos_token_id
    return [torch.tensor([*tokenizer(text, verbose=False)["input_ids"], end]) for text in texts]


def rows(documents: list[torch.Tensor], offset: int = 0) -> torch.Tensor:
    """Documents one after another, cut into rows of inputs and their last target."""
    stream = torch.cat(documents)[offset:]
    return stream.unfold(0, SEQUENCE + 1, SEQUENCE)


def batches(documents: list[torch.Tensor], seed: int) -> Iterator[torch.Tensor]:
    """Endless batches; every epoch shuffles the chapters and cuts them elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(documents), generator=generator).tolist()
        offset = int(torch.randint(SEQUENCE, (), generator=generator))
        epoch = rows([documents[i] for i in order], offset)
        yield from epoch[torch.randperm(len(epoch), generator=generator)].split(BATCH)[:-1]
