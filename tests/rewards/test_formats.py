import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import cloudpickle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankup.rewards.formats import json_schema, matches, tags, think_format

PERSON = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
TEXT = st.text(alphabet="ab<>/ \n", max_size=12)


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("<think>so</think>42", 1.0),
        ("<think>\nso\nand so\n</think>\n\n42\n", 1.0),
        (" \n<think></think> 42", 1.0),
        ([{"role": "assistant", "content": "<think>so</think>42"}], 1.0),
        ("<think>so</think>", 0.0),
        ("<think>so</think> \n", 0.0),
        ("42", 0.0),
        ("", 0.0),
        ("<think>so 42", 0.0),
        ("so</think>42", 0.0),
        ("Well: <think>so</think>42", 0.0),
        ("</think>so<think>42", 0.0),
        ("<think>a</think><think>b</think>42", 0.0),
        ("<think><think>a</think>42", 0.0),
        ("<think>a</think>42</think>", 0.0),
        ("<think>a</think>42<think>", 0.0),
        ("<THINK>a</THINK>42", 0.0),
    ],
)
def test_think_format(completion, score):
    assert think_format(completions=[completion, "x"]) == [score, 0.0]


def test_the_pattern_for_templates_that_begin_the_thought():
    reward = matches(r"(?:(?!</?think>).)*</think>(?!.*</?think>).*\S.*")
    completions = ["so\n</think>\n42", "</think>42", "so</think>", "<think>so</think>42", "so</think>4</think>2", "42"]
    assert reward(completions=completions) == [1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("completion", "share"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("\n<think>a\n\nb</think>\n \n<answer></answer> ", 1.0),
        ("<think>a</think>", 0.5),
        ("<answer>b</answer>", 0.5),
        ("let me see <answer>b</answer>", 0.5),
        ("Hi <think>a</think><answer>b</answer>", 0.5),
        ("<think>a</think>so<answer>b</answer>", 0.5),
        ("<think>a</think><answer>b</answer>!", 0.5),
        ("<answer>b</answer><think>a</think>", 0.5),
        ("<think>a<answer>b</answer></think>", 0.5),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0.5),
        ("<think>a</think><answer>b", 0.5),
        ("<think>a<think></think><answer>b</answer>", 0.5),
        ("</think>a<think></answer>b<answer>", 0.0),
        ("<answer>b", 0.0),
        ("", 0.0),
    ],
)
def test_tags(completion, share):
    assert tags(partial_credit=True)(completions=[completion]) == [share]
    assert tags()(completions=[completion]) == [float(share == 1.0)]


def test_tags_of_other_names():
    reward = cloudpickle.loads(cloudpickle.dumps(tags(["plan", "code", "test_1"], partial_credit=True)))
    assert reward.__name__ == "tags"
    right = "<plan>p</plan><code>c</code><test_1>t</test_1>"
    assert reward(completions=[right, right.replace("code", "coda"), "<plan>p</plan>"]) == pytest.approx([1, 2 / 3, 1 / 3])
    assert tags(["a"], partial_credit=True)(completions=["<a>1</a>", "so <a>1</a>", "so"]) == [1, 0, 0]


@given(TEXT, TEXT, st.sampled_from(["", " ", "\n\n"]))
def test_any_content_of_the_tags_is_allowed_except_a_tag(thought, answer, gap):
    completion = f"{gap}<think>{thought}</think>{gap}<answer>{answer}</answer>{gap}"
    assert tags()(completions=[completion, completion + "x", completion.replace("</think>", "")]) == [1, 0, 0]


@pytest.mark.parametrize("names", ["think", [], ["a", "a"], ["<think>"], ["a b"], [1]])
def test_names_that_are_no_tags(names):
    with pytest.raises(ValueError, match="tag"):
        tags(names)


@pytest.mark.parametrize(
    ("options", "scores"),
    [
        ({}, [1, 0, 1, 0]),
        ({"full": False}, [1, 1, 1, 0]),
        ({"flags": []}, [1, 0, 0, 0]),
        ({"flags": "IGNORECASE", "full": False}, [1, 1, 1, 1]),
        ({"flags": ["DOTALL", "IGNORECASE"]}, [1, 0, 1, 1]),
    ],
)
def test_matches(options, scores):
    reward = cloudpickle.loads(cloudpickle.dumps(matches("ab.*c?", **options)))
    assert reward.__name__ == "matches"
    assert reward(completions=["abc", " abc", "ab\nc", "ABC"]) == scores


@pytest.mark.parametrize(
    ("pattern", "flags", "message"),
    [
        ("a(b", [], r"invalid regular expression 'a\(b'"),
        ("(?a)a", ["ASCII", "DOTTED"], "unknown regular expression flag 'DOTTED': choose from ASCII"),
        ("(?u)a", ["ASCII"], "invalid regular expression"),
    ],
)
def test_an_invalid_pattern(pattern, flags, message):
    with pytest.raises(ValueError, match=message):
        matches(pattern, flags=flags)


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ('{"name": "Ada", "age": 36}', 1.0),
        ('\n {"name": "Ada"} ', 1.0),
        ('Here it is:\n```json\n{"name": "Ada"}\n```\nDone.', 1.0),
        ('```json\n{\n  "name": "Ada"\n}\n```', 1.0),
        ([{"role": "assistant", "content": '{"name": "Ada"}'}], 1.0),
        ('{"age": 36}', -0.5),
        ('{"name": 36}', -0.5),
        ("[]", -0.5),
        ("42", -0.5),
        ('```json\n{"name": 1}\n```', -0.5),
        ("", 0.0),
        ("Ada", 0.0),
        ('{"name": "Ada"', 0.0),
        ('It is {"name": "Ada"}', 0.0),
        ("{'name': 'Ada'}", 0.0),
        ('{"name": "Ada", "age": NaN}', 0.0),
        ('```json\n{"name": "Ada"}\n```\n```json\n{"name": "Bob"}\n```', 0.0),
        ('```\n{"name": "Ada"}\n```', 0.0),
        ("[" * 100_000, 0.0),
        ('{"name": ' + "9" * 5000 + "}", 0.0),
    ],
)
def test_json_schema(completion, score):
    reward = json_schema(PERSON, invalid_reward=-0.5)
    assert reward(completions=[completion, '{"name": "x"}']) == [score, 1.0]


def test_json_schema_from_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "person.json").write_text(json.dumps(PERSON))
    reward = json_schema("person.json")
    assert reward.__name__ == "json_schema"
    (tmp_path / "person.json").unlink()
    copy = cloudpickle.loads(cloudpickle.dumps(reward))
    assert copy(completions=['{"name": "Ada"}', "{}"]) == [1.0, 0.0]
    (tmp_path / "text.json").write_text("no JSON")
    with pytest.raises(ValueError, match=r"text\.json is not JSON"):
        json_schema("text.json")
    with pytest.raises(FileNotFoundError):
        json_schema("none.json")


def test_json_schema_of_each_row():
    reward = cloudpickle.loads(cloudpickle.dumps(json_schema(invalid_reward=0.1)))
    assert reward.__name__ == "json_schema"
    schemas = [json.dumps(PERSON), {"type": "array"}, None, '{"type": "array"}']
    assert reward(completions=['{"name": "Ada"}', "[1]", "x", "{}"], schema=schemas) == [1.0, 1.0, None, 0.1]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "person"}, "is not a valid JSON schema"),
        ({"required": "name"}, "is not a valid JSON schema"),
        ([1], "must be a mapping"),
    ],
)
def test_an_invalid_schema_is_an_error(schema, message):
    with pytest.raises(ValueError, match=f"the schema {message}"):
        json_schema(schema)
    with pytest.raises(ValueError, match=f"the schema of row 1 {message}"):
        json_schema()(completions=["1", "2"], schema=[{}, json.dumps(schema)])


def test_a_row_whose_schema_is_not_json():
    with pytest.raises(ValueError, match="the schema of row 0 is not JSON"):
        json_schema()(completions=["1"], schema=["{"])


@pytest.mark.parametrize("completion", ["[" * 900 + "]" * 900, "1e999", "[1e999]"])
def test_a_completion_cannot_break_the_validator(completion):
    reward = json_schema({"$defs": {"a": {"items": {"$ref": "#/$defs/a"}, "multipleOf": 0.1}}, "$ref": "#/$defs/a"})
    assert reward(completions=[completion, "[[0.5]]"]) == [0.0, 1.0]


def test_references_are_resolved_inside_the_schema_and_never_fetched():
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, format, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/person.json"
            with pytest.raises(ValueError, match=r"refers to .*person\.json.*, which it does not contain"):
                json_schema({"$ref": url})(completions=["1"])
        finally:
            server.shutdown()
            thread.join()
    assert requests == []
    assert json_schema({"$ref": "#/$defs/n", "$defs": {"n": {"type": "number"}}})(completions=["1", '"1"']) == [1.0, 0.0]
