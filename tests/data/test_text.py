"""Texts to rows of tokens: what is in a row, what counts, what is in which part."""

import gzip
import io
import json
import tarfile

import jax
import numpy as np
import pytest

from jaximm.carriers import MissingCarrierError
from jaximm.data import text
from jaximm.data.files import DataFileError
from jaximm.data.raw import texts
from jaximm.data.text import Document, Parts, RowsConfig


class Letters:
    """A tokenizer whose tokens are letters: code point - 30, 1 ends a text."""

    size = 100
    end = 1

    def encode_all(self, texts, *, special=True):
        start = [99] if special else []
        return [start + [ord(letter) - 30 for letter in text] for text in texts]

    def decode(self, tokens):
        return "".join(chr(token + 30) for token in tokens if token > 1 and token != 99)

    def chat(self, messages):
        return [98, *self.encode_all([messages[0]["content"]], special=False)[0], 97]


LETTERS = Letters()
TEXTS = [Document("abcde"), Document("fg"), Document("hijklmnopq")]


def rows(documents, **fields):
    return text.token_rows(documents, LETTERS, RowsConfig(**fields))


def test_texts_are_packed_end_to_end():
    split = rows(TEXTS, length=6)
    stream = [99, *map(code, "abcde"), 1, 99, *map(code, "fg"), 1, 99, *map(code, "hijklmnopq"), 1]
    assert split.tokens.dtype == np.int32
    np.testing.assert_array_equal(split.tokens.reshape(-1)[: len(stream)], stream)
    assert not split.tokens.reshape(-1)[len(stream) :].any()
    expected = np.arange(24) < len(stream)
    expected[::6] = False  # nothing stands before the first of a row
    np.testing.assert_array_equal(split.mask.reshape(-1), expected)
    np.testing.assert_array_equal(split.document, [0, 0, 2, 2])
    assert split.characters_per_token == pytest.approx(17 / len(stream))
    few = rows(TEXTS, length=6, rows=2)
    np.testing.assert_array_equal(few.tokens, split.tokens[:2])
    np.testing.assert_array_equal(few.mask, split.mask[:2])


def code(letter):
    return ord(letter) - 30


def test_packing_does_not_depend_on_how_many_are_encoded_at_once(monkeypatch):
    whole = rows(TEXTS, length=4), rows(TEXTS, length=4, layout="documents")
    monkeypatch.setattr(text.tokens, "_AT_ONCE", 1)
    apart = rows(TEXTS, length=4), rows(TEXTS, length=4, layout="documents")
    for one, other in zip(whole, apart, strict=True):
        for part, same in zip(one, other, strict=True):
            np.testing.assert_array_equal(part, same)


def test_rows_of_documents_hold_one_each():
    split = rows(TEXTS, length=6, layout="documents")
    np.testing.assert_array_equal(split.document, [0, 0, 1, 2, 2])
    np.testing.assert_array_equal(split.tokens[1], [1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(split.mask.sum(axis=1), [5, 0, 3, 5, 5])
    assert LETTERS.decode(split.tokens[3]) + LETTERS.decode(split.tokens[4]) == "hijklmnopq"


ANSWERS = [Document("12.", "ab"), Document("345.", "cde")]


def test_of_answers_only_the_answer_counts():
    split = rows(ANSWERS, length=10)
    np.testing.assert_array_equal(
        split.tokens[0], [99, *map(code, "ab"), *map(code, " 12."), 1, 0, 0]
    )
    assert LETTERS.decode(split.tokens[1][split.mask[1]]) == " 345."
    assert split.mask[1].sum() == 6  # the end too
    digits = rows(ANSWERS, length=10, counted="digits")
    assert [LETTERS.decode(row[m]) for row, m in zip(*digits[:2], strict=True)] == ["12", "345"]
    chat = rows(ANSWERS, length=10, chat=True)
    np.testing.assert_array_equal(
        chat.tokens[1], [98, *map(code, "cde"), 97, *map(code, "345."), 1]
    )
    assert LETTERS.decode(chat.tokens[1][chat.mask[1]]) == "345."


def test_targets_are_the_tokens_that_follow():
    split = rows(ANSWERS, length=10)
    y = text.next_tokens(split.tokens, split.mask)
    for row in range(2):
        for place in range(10):
            counts = place + 1 < 10 and bool(split.mask[row, place + 1])
            assert bool(y.mask[row, place]) == counts
            if counts:
                assert int(y.tokens[row, place]) == split.tokens[row, place + 1]


def test_a_batch_is_a_function_of_seed_and_step():
    split = rows([Document(letter * 7) for letter in "abcdef"], length=4)
    batch = jax.jit(lambda seed, step: text.token_batch(split, seed, step, 2))
    first, again, other = batch(0, 2), batch(0, 2), batch(1, 2)
    np.testing.assert_array_equal(first.x, again.x)
    assert not np.array_equal(first.x, other.x)
    assert first.y.tokens.shape == (2, 4)
    seen = np.concatenate([batch(5, step).x for step in range(len(split.tokens) // 2)])
    assert sorted(seen.tolist()) == sorted(split.tokens.tolist())  # one epoch


def test_no_document_is_in_two_parts_and_copies_count_once():
    documents = [Document(f"text {index % 20}") for index in range(60)]
    documents += [Document(f"answer {index}", "asked", f"group {index % 3}") for index in range(9)]
    parts = text.split_documents(documents, selection=0.2, held_out=0.3, seed=1)
    flat = [document for part in parts for document in part]
    assert sorted(flat) == sorted(set(documents))
    assert len(flat) == 29
    groups = [{document.group for document in part if document.group} for part in parts]
    assert sum(map(len, groups)) == 3  # none is in two
    assert parts == text.split_documents(documents, selection=0.2, held_out=0.3, seed=1)
    assert parts != text.split_documents(documents, selection=0.2, held_out=0.3, seed=2)
    least = text.split_documents(documents[:3], selection=0.9, held_out=0.05)
    assert list(map(len, least)) == [1, 1, 1]


def test_secrets_are_taught_in_some_phrasings_and_asked_in_another():
    task = text.load_text("text:secrets", LETTERS, count=5, digits=4, length=60)
    facts = text.secrets(5, digits=4)
    assert len({fact.name for fact in facts}) == 5
    assert [len(split.tokens) for split in (task.train, task.selection, task.held_out)] == [
        10,
        5,
        5,
    ]
    for split in (task.train, task.selection, task.held_out):
        codes = [LETTERS.decode(row[m]) for row, m in zip(split.tokens, split.mask, strict=True)]
        assert codes == [fact.code for fact in facts] * (len(codes) // 5)
    asked = [
        LETTERS.decode(split.tokens[0]) for split in (task.train, task.selection, task.held_out)
    ]
    assert len(set(asked)) == 3
    assert all(facts[0].name in prompt for prompt in asked)
    parts = text.text_parts("text:secrets", count=5, parted="facts")
    names = [{document.group for document in part} for part in parts]
    assert [len(part) for part in names] == [3, 1, 1]
    assert not names[0] & names[2]
    assert text.secrets(5, seed=1) != text.secrets(5)


def test_a_users_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt").write_text("\ufeffgrüße\n", "utf-8")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.txt").write_text("no")
    (tmp_path / "notes.md").write_text("no")
    lines = [{"text": "two\u2028lines"}, {"text": "three", "id": 3}]
    (tmp_path / "b.jsonl").write_text(
        "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n", "utf-8"
    )
    found = text.read_folder(tmp_path)
    assert [document.text for document in found] == ["grüße\n", "two\u2028lines", "three"]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "p", "answer": "a"}\n{"prompt": "q", "completion": "b"}')
    assert text.read_folder(pairs) == (Document("a", "p"), Document("b", "q"))
    several = tmp_path / "several"
    several.mkdir()
    for letter in "abcd":
        (several / f"{letter}.txt").write_text(letter * 9)
    task = text.load_text("text:folder", LETTERS, path=str(several), length=5)
    first = [LETTERS.decode(split.tokens[0])[0] for split in task[1:4]]
    assert len(set(first)) == 3


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.txt", b" \n", r"a.txt: has no text; fill it"),
        ("a.txt", b"\xff\xfe\x00", r"a.txt: cannot be read as UTF-8 text .*save it as UTF-8"),
        ("a.jsonl", b"", r"a.jsonl: is empty; give .txt files"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a.jsonl, line 2: cannot be read as JSON"),
        ("a.jsonl", b'["x"]', r'a.jsonl, line 1: expected an object with "text"'),
        (
            "a.jsonl",
            b'{"prompt": "x"}',
            r'line 1: expected an object with "text", or with "prompt"',
        ),
        ("a.jsonl", b'{"text": " "}', r"a.jsonl, line 1: has no text"),
        ("a.md", b"x", r"holds no .txt or .jsonl file; give .txt files, a document each"),
    ],
)
def test_files_that_are_refused(name, content, match, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataFileError, match=match):
        text.read_folder(tmp_path)
    with pytest.raises(DataFileError, match=r"none: no folder, no .txt"):
        text.read_folder(tmp_path / "none")


def refused(match, function, *args, **fields):
    with pytest.raises(ValueError, match=match):
        function(*args, **fields)


def test_texts_that_are_refused():
    refused(r"text: no documents", text.split_documents, [])
    refused(r"text: document 1 has no text", text.split_documents, [Document("a"), Document(" ")])
    refused(r"text: 2 different documents cannot be split", text.split_documents, TEXTS[:2] * 2)
    refused(
        r"selection and held_out must be in \(0, 1\)", text.split_documents, TEXTS, held_out=1.0
    )
    refused(r"text: no documents; give one", rows, [])
    refused(r"some documents have a prompt and some have none", rows, TEXTS + ANSWERS)
    refused(r"the texts are no answers; leave out chat", rows, TEXTS, chat=True)
    refused(
        r"document 1 has 10 tokens .* may not be cut; give length >= 10, not 9",
        rows,
        [Document("1", "a"), Document("2345", "abc")],
        length=9,
    )
    refused(
        r"no document fits into 4 tokens; give length >= 8",
        rows,
        ANSWERS,
        length=4,
        too_long="leave_out",
    )
    refused(
        r"no token of 1 rows is to be predicted.*or counted='all'",
        rows,
        [Document("x", "a")],
        length=9,
        counted="digits",
    )
    assert (
        len(rows([*ANSWERS, Document("1" * 9, "a")], length=10, too_long="leave_out").tokens) == 2
    )
    for match, fields in {
        r"length must be >= 2, got 1": {"length": 1},
        r"layout must be 'packed' or 'documents', got 'x'": {"layout": "x"},
        r"counted must be 'all' or 'digits', got 'x'": {"counted": "x"},
        r"too_long must be 'refuse' or": {"too_long": "x"},
        r"rows must be >= 1 or None, got 0": {"rows": 0},
    }.items():
        refused(match, RowsConfig, **fields)


def test_tasks_that_are_refused():
    load = text.load_text
    refused(
        r"unknown text 'text:poems'; choose from \['text:dialogue'", load, "text:poems", LETTERS
    )
    refused(
        r"the tokenizer has 100 tokens, the model's embedding 99 rows; give the tokenizer",
        load,
        "text:secrets",
        LETTERS,
        vocabulary=99,
    )
    refused(
        r"length is 64, but the model was made for 32 positions",
        load,
        "text:secrets",
        LETTERS,
        context=32,
    )
    refused(
        r"secrets: expected a SecretsConfig, got a RowsConfig",
        load,
        "text:secrets",
        LETTERS,
        RowsConfig(),
    )
    refused(
        r"give either config or single fields", load, "text:secrets", LETTERS, RowsConfig(), rows=1
    )
    refused(r"path is empty", load, "text:folder", LETTERS)
    refused(r"phrasings must be in 3..6, got 2", load, "text:secrets", LETTERS, phrasings=2)
    refused(r"parted must be 'phrasings' or 'facts'", load, "text:secrets", LETTERS, parted="x")
    refused(r"count and digits must be >= 1", load, "text:secrets", LETTERS, count=0)
    refused(r"unknown .*'cuont'.*count", load, "text:secrets", LETTERS, cuont=3)


def archive(files, mode="w:gz"):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as out:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    return packed.getvalue()


LONG = "a word or two in a mail that somebody wanted to have, or so they said " * 2
PLAIN = f"From: x\nSubject: no\n\n{LONG}\nhttp://example.org/x end".encode()
HTML = (
    "MIME-Version: 1.0\nContent-Type: text/html; charset=utf-8\nContent-Transfer-Encoding: "
    f"quoted-printable\n\n<style>p {{}}</style><p>gr=C3=BC=C3=9Fe {LONG}</p>"
).encode()


def test_readers_of_published_archives(tmp_path):
    path = tmp_path / "x.tgz"
    path.write_bytes(
        archive({"package/data/1801_b.txt": b"b\n c", "package/data/1790_a.txt": b"a"})
    )
    assert list(texts.read_speeches(path).items()) == [("1790_a", "a"), ("1801_b", "b c")]
    mails = {"p/spam-1/1.txt": HTML, "p/easy-ham-1/2.txt": PLAIN, "p/hard-ham-1/3.txt": b"\nshort"}
    path.write_bytes(archive(mails))
    assert texts.read_mails(spam=False, path=path) == {"easy-ham-1/2": f"{LONG}end"}
    assert texts.read_mails(spam=True, path=path) == {"spam-1/1": f"grüße {LONG.strip()}"}
    inner = archive(
        {"x/nytEditorialSnippets_GroundTruth.txt": b"1_1\t0.5\tOne  two.\r\n2_1\t-1.25\tThree.\r\n"}
    )
    path.write_bytes(archive({"v/hutto_ICWSM_2014.tar.gz": inner}))
    found = texts.read_snippets("nytEditorial", path)
    assert found == [("One two.", "1", 0.5), ("Three.", "2", -1.25)]
    with pytest.raises(DataFileError, match=r"holds no movieReviewSnippets_GroundTruth.txt"):
        texts.read_snippets("movieReview", path)
    with pytest.raises(ValueError, match=r"unknown source 'x'; choose from"):
        texts.read_snippets("x", path)
    path.write_bytes(gzip.compress(b"no archive"))
    with pytest.raises(DataFileError, match=r"x.tgz: cannot be read as a packed archive"):
        texts.read_speeches(path)


def installed(name):
    try:
        return text.text_parts(name)
    except MissingCarrierError as error:
        pytest.skip(str(error))


def test_conversations_are_each_there_once():
    pytest.importorskip("yaml", reason="pip install jaximm[text]")
    parts = installed("text:dialogue")
    flat = [document.text for part in parts for document in part]
    assert len(flat) == len(set(flat)) == 899
    replies = installed("text:replies")
    assert all(document.prompt for part in replies for document in part)
    assert not {d.prompt for d in replies.train} & {d.prompt for d in replies.held_out}


REQUESTS = 'category,source,forbidden_prompt\nA,x,first  one\nB,y,"second, one"\nB,y, \n'


def test_requests_come_with_as_many_that_may_be_answered(tmp_path, monkeypatch):
    path = tmp_path / "x.csv"
    path.write_bytes(b"\xef\xbb\xbf" + REQUESTS.encode())
    assert texts.read_requests(path) == (("first one", "A"), ("second, one", "B"))
    path.write_text("category,prompt\nA,x\n")
    with pytest.raises(DataFileError, match=r"x.csv has no column 'forbidden_prompt'"):
        texts.read_requests(path)
    path.write_bytes(b"category,forbidden_prompt\nA,\xff\n")
    with pytest.raises(DataFileError, match=r"x.csv"):
        texts.read_requests(path)

    path.write_text(REQUESTS)
    monkeypatch.setattr(texts, "carrier_file", lambda carrier: path)
    spoken = {"t": [["p", "q"], ["r", "s"]], "u": [["v", "w"], ["p", "z"]]}
    monkeypatch.setattr(texts, "read_conversations", lambda: spoken)
    documents = text.CORPORA["requests"].read()
    assert [(one.prompt, one.text) for one in documents] == [
        ("Request: p\nRefuse it:", "no"),
        ("Request: r\nRefuse it:", "no"),
        ("Request: first one\nRefuse it:", "yes"),
        ("Request: second, one\nRefuse it:", "yes"),
    ]
    # Whichever there are fewer of: none stands there twice.
    monkeypatch.setattr(texts, "read_conversations", lambda: {"t": [["p", "q"]]})
    documents = text.CORPORA["requests"].read()
    assert [one.text for one in documents] == ["no", "yes"]


@pytest.mark.slow
def test_requests_of_the_carrier():
    parts = installed("text:requests")
    answers = [document.text for part in parts for document in part]
    assert (answers.count("yes"), answers.count("no")) == (313, 313)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count"),
    [("speeches", 233), ("prose", 498), ("ham", 3998), ("spam", 1543), ("reviews", 0)],
)
def test_corpora_have_the_documents_that_are_known(name, count):
    parts = installed(f"text:{name}")
    flat = [document for part in parts for document in part]
    assert len(flat) == len(set(flat))
    assert len(flat) == count or name == "reviews"
    if name == "reviews":
        assert {document.text for document in flat} == {"good", "bad"}


def test_a_real_tokenizer_is_an_encoder():
    tk = pytest.importorskip("tokenizers", reason="pip install jaximm[text]")
    from jaximm.models.llama import Tokenizer

    library = tk.Tokenizer(tk.models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "7": 3, "?": 4}, "?"))
    library.pre_tokenizer = tk.pre_tokenizers.Whitespace()
    library.add_special_tokens(["<s>", "</s>"])
    library.post_processor = tk.processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    tokenizer = Tokenizer(library, None, {"eos_token": "</s>"}, (4, 1))
    assert (tokenizer.size, tokenizer.end) == (5, 1)
    assert tokenizer._replace(texts={}).end == 4
    assert tokenizer._replace(texts={}, stop=()).end is None
    split = text.token_rows([Document("7 a", "a a")], tokenizer, RowsConfig(length=7))
    assert split.tokens.tolist() == [[0, 2, 2, 3, 2, 1, 0]]
    assert split.mask.tolist() == [[False, False, False, True, True, True, False]]
    parts = Parts((Document("a 7"),), (Document("a"),), (Document("7"),))
    with pytest.raises(ValueError, match=r"tokenizer has 5 tokens, the model's embedding 4 rows"):
        text.token_splits(parts, tokenizer, RowsConfig(), vocabulary=4)
