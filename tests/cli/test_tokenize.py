"""``lightning-fastmoe tokenize``: what the files hold, which split, and what is refused."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from lightning_fastmoe import cli
from lightning_fastmoe.demos.token_lm import documents, tokenizer, writer

EOS = "<|endoftext|>"
TEXTS = [f"Document {i}: the quick brown fox\n\njumps over {i * 7} é dogs. \n" for i in range(40)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with TEXTS in corpus.jsonl and an empty document among them."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(TEXTS)]
    Path("corpus.jsonl").write_text("\n".join([*lines, '{"text": ""}', "", ""]))
    return tmp_path


def tokenize(*words: str) -> int:
    try:
        return cli.main(["tokenize", *words])
    except SystemExit as stopped:  # argparse's way
        return int(stopped.code or 0)


def small(*words: str) -> int:
    """With a tokenizer trained on the input, into ./data."""
    return tokenize("--train-tokenizer=300", "--output=data", "--val-fraction=0.3", *words)


def read(folder: Path, split: str) -> list[str]:
    """The documents of a split, decoded by the library itself."""
    content = json.loads((folder / "tokens.json").read_text())
    codec = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = np.fromfile(folder / f"{split}.bin", "<u2" if content["dtype"] == "uint16" else "<u4")
    assert len(ids) == content["splits"][split]["tokens"]
    ends = np.flatnonzero(ids == content["eos_id"])
    assert ends[-1] == len(ids) - 1
    assert len(ends) == content["splits"][split]["documents"]
    starts = [0, *(ends[:-1] + 1)]
    return [codec.decode(ids[a:b].tolist()) for a, b in zip(starts, ends, strict=True)]


def word_tokenizer(path: Path, size: int, **options: object) -> None:
    """A tokenizer of ``size`` whole words, w0, w1, ..., with </s> as its last token."""
    words = {f"w{i}": i for i in range(size - 1)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["</s>"])
    if options.get("truncates"):
        made.enable_truncation(2)
        made.enable_padding(length=2)
    if options.get("adds_eos"):
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="</s> $A </s>", special_tokens=[("</s>", size - 1)]
        )
    made.save(str(path))


def test_every_document_decodes_to_itself(folder: Path) -> None:
    assert small("corpus.jsonl") == 0
    train, val = read(folder / "data", "train"), read(folder / "data", "val")
    assert sorted(train + val) == sorted(TEXTS)
    assert train == [text for text in TEXTS if text in train]  # in their order
    assert 4 <= len(val) <= 20


def test_manifest_says_what_was_done(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert small("corpus.jsonl", "--json") == 0
    content = json.loads((folder / "data" / "tokens.json").read_text())
    assert json.loads(capsys.readouterr().out) == content
    codec = (folder / "data" / "tokenizer.json").read_bytes()
    assert content["version"] == 1
    assert content["tokenizer_sha256"] == hashlib.sha256(codec).hexdigest()
    assert (content["eos"], content["vocab_size"], content["dtype"]) == (EOS, 300, "uint16")


def test_split_depends_on_content_and_seed_alone(folder: Path) -> None:
    assert small("corpus.jsonl") == 0
    before = set(read(folder / "data", "val"))
    # Other files, another order, and each document twice.
    Path("parts").mkdir()
    for i, text in enumerate(reversed(TEXTS)):
        Path("parts", f"{i}.txt").write_text(text)
    assert small("parts", "corpus.jsonl", "--force") == 0
    assert sorted(read(folder / "data", "val")) == sorted([*before, *before])
    assert before.isdisjoint(read(folder / "data", "train"))
    assert small("corpus.jsonl", "--seed=1", "--force") == 0
    assert set(read(folder / "data", "val")) != before


def test_two_runs_write_the_same_bytes(folder: Path) -> None:
    assert small("corpus.jsonl") == 0
    first = {file.name: file.read_bytes() for file in (folder / "data").iterdir()}
    assert set(first) == {"train.bin", "val.bin", "tokens.json", "tokenizer.json"}
    assert small("corpus.jsonl", "--force") == 0
    assert {file.name: file.read_bytes() for file in (folder / "data").iterdir()} == first


def test_kinds_of_files(folder: Path) -> None:
    texts = Path("texts")
    (texts / "sub").mkdir(parents=True)
    (texts / "a.md").write_bytes(b"\xef\xbb\xbfa markdown\r\nfile")
    (texts / "sub" / "b.py").write_text("x = 1\n")
    (texts / ".hidden.txt").write_text("hidden")
    (texts / "image.png").write_bytes(b"\x89PNG")
    with gzip.open(texts / "c.jsonl.gz", "wt") as stream:
        stream.write('{"body": "one"}\n{"body": "two"}')
    words = ["texts", "--text-key=body", "--output=data", "--val-fraction=0"]
    assert tokenize(*words, "--train-tokenizer=300") == 0
    assert read(folder / "data", "train") == ["a markdown\r\nfile", "one", "two", "x = 1\n"]
    assert (folder / "data" / "val.bin").read_bytes() == b""


def test_text_that_looks_like_the_end_of_text_is_text(folder: Path) -> None:
    text = f"before {EOS} after"
    Path("a.txt").write_text(text)
    Path("b.txt").write_text("next")
    assert (
        tokenize("a.txt", "b.txt", "--train-tokenizer=300", "--output=d", "--val-fraction=0") == 0
    )
    assert read(folder / "d", "train") == [text, "next"]


@pytest.mark.parametrize(("size", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_dtype_fits_the_vocabulary(folder: Path, size: int, dtype: str) -> None:
    Path("codec").mkdir()
    word_tokenizer(Path("codec", "tokenizer.json"), size)
    Path("a.txt").write_text("w1 w65534 w2")
    assert tokenize("a.txt", "--tokenizer=codec", "--output=data", "--val-fraction=0") == 0
    content = json.loads(Path("data", "tokens.json").read_text())
    assert (content["dtype"], content["eos"], content["eos_id"]) == (dtype, "</s>", size - 1)
    ids = np.frombuffer(Path("data", "train.bin").read_bytes(), np.dtype(dtype).newbyteorder("<"))
    unknown_or_last = 65534 if size - 1 > 65534 else 0  # w65534 only exists in the larger one
    assert ids.tolist() == [1, unknown_or_last, 2, size - 1]


def test_nothing_is_added_cut_or_padded(folder: Path) -> None:
    word_tokenizer(Path("t.json"), 10, truncates=True, adds_eos=True)
    Path("a.txt").write_text("w1 w2 w3 w4")
    Path("b.txt").write_text("w5")
    words = ["a.txt", "b.txt", "--tokenizer=t.json", "--output=data", "--val-fraction=0"]
    assert tokenize(*words) == 0
    assert np.fromfile("data/train.bin", "<u2").tolist() == [1, 2, 3, 4, 9, 5, 9]


def test_batches_do_not_change_the_result(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert small("corpus.jsonl") == 0
    expected = Path("data", "train.bin").read_bytes()
    monkeypatch.setattr(writer, "_BATCH_CHARACTERS", 100)
    monkeypatch.setattr(writer, "_BATCH_DOCUMENTS", 3)
    assert small("corpus.jsonl", "--force") == 0
    assert Path("data", "train.bin").read_bytes() == expected


def test_documents_are_read_one_batch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_BATCH_DOCUMENTS", 4)
    taken = []
    batches = writer._batches(taken.append(text) or text for text in TEXTS)
    assert next(batches) == TEXTS[:4]
    assert taken == TEXTS[:4]


@pytest.mark.parametrize("existing", [False, True])
def test_ctrl_c_leaves_nothing_half_done(
    folder: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    if existing:
        assert small("corpus.jsonl") == 0
    names = sorted(file.name for file in folder.iterdir())
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    encode = tokenizer.DocumentEncoder.encode

    def interrupted(self: tokenizer.DocumentEncoder, texts: list[str]) -> list[list[int]]:
        if "Document 8:" in texts[0]:
            assert len(list(folder.glob(".data.*"))) == 1  # it had begun to write
            raise KeyboardInterrupt
        return encode(self, texts)

    monkeypatch.setattr(writer, "_BATCH_DOCUMENTS", 4)
    monkeypatch.setattr(tokenizer.DocumentEncoder, "encode", interrupted)
    assert small("corpus.jsonl", "--force") == 130
    assert sorted(file.name for file in folder.iterdir()) == names
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_former_files_stay_when_the_new_ones_cannot_be_published(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert small("corpus.jsonl") == 0
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if target == folder / "data" and not self.name.endswith(".former"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    assert small("corpus.jsonl", "--seed=1", "--force") == 130
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


TRAIN = "--train-tokenizer=300"
OUT = "--output=data"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([TRAIN, OUT], "required: INPUT"),
        (["corpus.jsonl", OUT], "one of the arguments --tokenizer --train-tokenizer is required"),
        (["corpus.jsonl", OUT, TRAIN, "--tokenizer=x"], "not allowed with argument"),
        (["nowhere.txt", TRAIN, OUT], "'nowhere.txt' does not exist"),
        (["table.csv", TRAIN, OUT], "'table.csv' is of an unknown kind"),
        (["empty.txt", TRAIN, OUT], "no documents, or only empty ones"),
        (["void", TRAIN, OUT], "no documents, or only empty ones"),
        (["latin1.txt", TRAIN, OUT], "latin1.txt is not UTF-8: byte 1 is 0xe9"),
        (
            ["corpus.jsonl", TRAIN, OUT, "--text-key=body"],
            "line 1 has no key 'body'; its keys are:",
        ),
        (
            ["corpus.jsonl", TRAIN, OUT, "--text-key=id"],
            "a value of type int under 'id'",
        ),
        (["broken.jsonl", TRAIN, OUT], "broken.jsonl, line 2 is not JSON"),
        (["list.jsonl", TRAIN, OUT], "list.jsonl, line 1 is not a JSON object"),
        (["half.jsonl", TRAIN, OUT], "half.jsonl, line 1 has half of a surrogate pair"),
        (["cut.jsonl.gz", TRAIN, OUT], "cut.jsonl.gz can't be read: Compressed file ended"),
        (["corpus.jsonl", "--tokenizer=gone", OUT], "gone can't be read: No such file"),
        (["corpus.jsonl", "--tokenizer=list.jsonl", OUT], "list.jsonl is not a tokenizer.json"),
        (
            ["corpus.jsonl", "--tokenizer=w.json", OUT, "--eos=x"],
            "There is no token 'x' for w.json",
        ),
        (["eos.txt", "--tokenizer=w.json", OUT, "--eos=w3"], "'w3' occurs within a document"),
        (["corpus.jsonl", "--train-tokenizer=256", OUT], "at least 257 tokens"),
        (["corpus.jsonl", TRAIN, OUT, "--val-fraction=1"], "--val-fraction 1.0 is out of range"),
        (["eos.txt", TRAIN, OUT, "--val-fraction=1e-9"], "None of the 1 documents is in the val"),
        (["corpus.jsonl", TRAIN, "--output=list.jsonl"], "exists and holds no token files"),
        (["corpus.jsonl", TRAIN, "--output=sub", "--force"], "exists and holds no token files"),
        (["corpus.jsonl", TRAIN, "--output=eos.txt/x"], "can't be written: File exists"),
        (["corpus.jsonl", TRAIN, "--output=."], "'corpus.jsonl' is inside of --output"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("table.csv").write_text("a,b")
    Path("empty.txt").touch()
    Path("void").mkdir()
    Path("sub").mkdir()
    Path("sub", "thesis.txt").write_text("my only copy")
    Path("latin1.txt").write_bytes("vérité".encode("latin-1"))
    Path("broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    Path("list.jsonl").write_text('["text"]')
    Path("half.jsonl").write_text('{"text": "\\ud800"}')
    Path("cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 99)[:-9])
    Path("eos.txt").write_text("w2 w3 w4")
    word_tokenizer(Path("w.json"), 10)
    before = sorted(folder.rglob("*"))
    assert tokenize(*words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert expected in err
    assert err.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


def test_existing_output_needs_force(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert small("corpus.jsonl") == 0
    before = Path("data", "val.bin").read_bytes()
    assert small("corpus.jsonl", "--seed=1") == 2
    assert "'data' exists already" in capsys.readouterr().err
    assert Path("data", "val.bin").read_bytes() == before
    assert small("corpus.jsonl", "--seed=1", "--force") == 0
    assert Path("data", "val.bin").read_bytes() != before


def test_long_documents_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 100)
    Path("long.txt").write_text("x" * 101)
    Path("lines.jsonl").write_text('{"text": "short"}\n' + json.dumps({"text": "x" * 100}))
    assert small("long.txt") == 2
    assert "long.txt is longer than" in capsys.readouterr().err
    assert small("lines.jsonl") == 2
    assert "lines.jsonl, line 2 is longer than" in capsys.readouterr().err


def test_several_usual_ends_of_text_need_a_choice(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a"))
    made.add_special_tokens(["</s>", EOS])
    made.save("t.json")
    words = ["corpus.jsonl", "--tokenizer=t.json", OUT]
    assert tokenize(*words) == 2
    assert f"it has {EOS}, </s>. Name the token with --eos" in capsys.readouterr().err
    assert tokenize(*words, "--eos=</s>", "--val-fraction=0.3") == 0
    assert json.loads(Path("data", "tokens.json").read_text())["eos_id"] == 1


def test_missing_library_names_the_extra(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert small("corpus.jsonl") == 2
    assert "pip install 'lightning-fastmoe[text]'" in capsys.readouterr().err


def test_needs_neither_torch_nor_lightning(folder: Path) -> None:
    script = (
        "import sys\n"
        "from lightning_fastmoe import cli\n"
        f"assert cli.main(['tokenize', 'corpus.jsonl', '{TRAIN}', '{OUT}']) == 0\n"
        "print(sorted({'torch', 'pytorch_lightning'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
