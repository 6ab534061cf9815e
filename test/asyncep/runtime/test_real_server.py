"""Runtime and jobs on a real model with two ranks, one start for all: against Transformers, killed, and by the book."""

from __future__ import annotations

import asyncio
import doctest
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pandas
import polars
import psutil
import public_api_program
import pytest
import torch
from certificates import own_certificate
from transformers import AutoModelForCausalLM, AutoTokenizer

import asyncep
from asyncep import Runtime
from asyncep.cli import main
from asyncep.client.errors import OptionError
from asyncep.client.generate import Behind
from asyncep.client.scorer import INTERACTIVE_PROMPTS
from asyncep.client.tokens import LocalTokens, ServerTokens
from asyncep.jobs.spec import Progress
from asyncep.runtime import runtime as runtime_module
from asyncep_sgl.process.ports import free_port

pytestmark = pytest.mark.server

DOCS = Path(__file__).parents[3] / "docs" / "use"
# The bf16 weights are exact in fp32; served and reference differ by the order of their sums.
TOLERANCE = 1e-3
CHAT = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>{% endif %}"
)


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Mixtral with a chat template."""
    folder = tmp_path_factory.mktemp("chatty") / "model"
    folder.mkdir()
    for file in tiny_model("mixtral").iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(CHAT)
    return folder


@pytest.fixture(scope="module")
def runtime(model: Path) -> Iterator[Runtime]:
    # Other tests of this process may have children of their own, such as multiprocessing's resource tracker.
    before = set(psutil.Process().children(recursive=True))
    port = free_port()
    with Runtime(str(model), dp_size=2, dtype="float32", log_level="error", port=port) as started:
        assert started.url == f"http://127.0.0.1:{port}"
        children = [child for child in psutil.Process().children(recursive=True) if child not in before]
        yield started
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    with pytest.raises(RuntimeError, match="not started"):
        started.classify(["x"], ["a", "b"])


class Oracle:
    """Transformers in fp32."""

    def __init__(self, model: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def logs(self, ids: list[int]) -> torch.Tensor:
        """Log-probabilities after each position, [tokens, vocabulary]."""
        with torch.no_grad():
            return self.net(torch.tensor([ids])).logits[0].log_softmax(-1)  # type: ignore[no-any-return]

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text).input_ids  # type: ignore[no-any-return]

    def label(self, prompt: str, label: str, space: str = " ") -> float:
        """Full log-likelihood of a label after a prompt."""
        ids, tail = self.ids(prompt), self.tokenizer(f"{space}{label}", add_special_tokens=False).input_ids
        logs = self.logs([*ids, *tail])
        return sum(float(logs[len(ids) - 1 + i, token]) for i, token in enumerate(tail))


@pytest.fixture(scope="module")
def oracle(model: Path) -> Oracle:
    return Oracle(model)


# Of one token; of several with different stems; of three and more, with a common beginning.
# " ham" has the vocabulary's last token in its middle, which SGLang misnames.
@pytest.mark.parametrize(
    "labels", [["ham", "c"], ["b", "c"], ["several tokens", "c", "model"], ["models here", "models there", "spam"]]
)
@pytest.mark.parametrize("length", ["sum", "mean"])
def test_labels_by_their_full_log_likelihood(runtime: Runtime, oracle: Oracle, labels: list[str], length: str) -> None:
    texts = ["the first text of all", "import torch", "class X"]
    for text, found in zip(
        texts, runtime.classify(texts, labels, template="T: {text}\nL:", length=length), strict=True
    ):
        expected = {label: oracle.label(f"T: {text}\nL:", label) for label in labels}
        if length == "mean":
            expected = {label: score / len(oracle.ids(f" {label}")) for label, score in expected.items()}
        assert found.log_probabilities == pytest.approx(expected, abs=TOLERANCE)
        assert found.label == max(expected, key=expected.__getitem__)


def test_score_logprobs_and_rerank(runtime: Runtime, oracle: Oracle) -> None:
    tokens = [5, 77, 300]
    [score] = runtime.score("is this ", ["good"], tokens)
    expected = oracle.logs(oracle.ids("is this good"))[-1, tokens]
    assert score.log_probabilities == pytest.approx(expected.tolist(), abs=TOLERANCE)
    assert score.values == pytest.approx(expected.softmax(-1).tolist(), abs=TOLERANCE)
    by_text, by_ids = runtime.logprobs(["some text", oracle.ids("some text")], tokens)
    assert by_text.log_probabilities == pytest.approx(by_ids.log_probabilities, abs=TOLERANCE)
    ranked = runtime.rerank("a cat", ["one cat", "two dogs", "no"], template="{query} {document}:", answers=("b", "c"))
    odds = {
        i: oracle.label(f"a cat {document}:", "b") - oracle.label(f"a cat {document}:", "c")
        for i, document in enumerate(["one cat", "two dogs", "no"])
    }
    assert [entry.index for entry in ranked] == sorted(odds, key=lambda i: -odds[i])
    for entry in ranked:
        assert entry.score == pytest.approx(1 / (1 + math.exp(-odds[entry.index])), abs=TOLERANCE)


def test_the_longest_prompt_is_the_one_that_is_stated(runtime: Runtime) -> None:
    """What `/v1/models` says is accepted, and one token more is not, by the server itself."""
    [card] = httpx.get(runtime.url + "/v1/models", timeout=30).json()["data"]
    most = card["max_model_len"]
    prefill = {"sampling_params": {"max_new_tokens": 0}}
    for path, body, field in (
        ("/generate", lambda ids: {"input_ids": ids, **prefill}, "input_ids"),
        ("/v1/completions", lambda ids: {"model": "m", "prompt": ids, "max_tokens": 0, "echo": True}, "prompt"),
    ):
        fits, beyond = (httpx.post(runtime.url + path, json=body([5] * n), timeout=60) for n in (most, most + 1))
        assert fits.status_code == 200, fits.text
        assert beyond.status_code == 400
        assert f"{field}: the prompt has {most + 1} tokens" in beyond.text
        assert f"leaves room for {most}" in beyond.text
    [short, long] = runtime.logprobs([[5] * most, [5] * (most + 1)], [6])
    assert short.error is None
    assert f"room for {most}" in (long.error or "")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_completion_tokens": 5}, "max_completion_tokens (or max_tokens): this server is prefill-only"),
        ({"max_tokens": 5}, "max_completion_tokens (or max_tokens): this server is prefill-only"),
        ({"max_tokens": 1, "logprobs": True, "top_logprobs": 2**40}, "top_logprobs: "),
        ({"max_tokens": 1, "seed": 2**70}, "seed: "),
        ({"max_tokens": 1, "min_tokens": -1}, "min_tokens: "),
        ({"max_tokens": 1, "messages": [{"role": "user", "content": "x " * 3000}]}, "messages: the prompt has "),
    ],
)
def test_a_chats_fields_are_refused_by_their_own_names(runtime: Runtime, fields: dict[str, Any], said: str) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    answer = httpx.post(f"{runtime.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 400, answer.text
    assert answer.json()["message"].startswith(said)


def test_no_alternatives_are_none(runtime: Runtime) -> None:
    body = {"model": "m", "prompt": [5, 6, 7], "max_tokens": 0, "echo": True}
    found = [
        httpx.post(f"{runtime.url}/v1/completions", json={**body, "logprobs": count}, timeout=60).json()["choices"][0]
        for count in (0, 1)
    ]
    none, one = (choice["logprobs"]["token_logprobs"] for choice in found)
    assert len(none) == 3
    assert none[1:] == one[1:]


def test_tokens_that_there_are_not_are_the_calls_error(runtime: Runtime) -> None:
    with pytest.raises(OptionError, match=r"label_token_ids: .*token_ids_logprob"):
        runtime.score("a", ["b", "c"], [5, 10**6])
    with pytest.raises(OptionError, match=r"token_ids: .*token_ids_logprob"):
        runtime.logprobs(["a"], [10**6])


def test_chat_prompts(runtime: Runtime, oracle: Oracle) -> None:
    options: dict[str, Any] = {"template": "About {text}?", "chat": True, "system": "Be brief."}
    [found] = runtime.classify(["cats"], ["b", "c"], **options)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "About cats?"}]
    text = oracle.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # The label is the first word of the assistant's turn.
    expected = {label: oracle.label(text, label, "") for label in ("b", "c")}
    assert found.log_probabilities == pytest.approx(expected, abs=TOLERANCE)


def test_several_labels_words_and_cuts(runtime: Runtime, oracle: Oracle) -> None:
    [found] = runtime.classify(["a cat"], ["b", "c"], template="T: {text}\nIs it {label}?", multi_label=True)
    for label in ("b", "c"):
        prompt = f"T: a cat\nIs it {label}?"
        odds = oracle.label(prompt, "yes") - oracle.label(prompt, "no")
        assert found.probabilities[label] == pytest.approx(1 / (1 + math.exp(-odds)), abs=TOLERANCE)
    [found] = runtime.classify(["a cat"], ["b", "c"], template="T: {text}\n", words={"b": ["b", "models"]})
    mass = sum(math.exp(oracle.label("T: a cat\n", word, "")) for word in ("b", "models"))
    assert found.log_probabilities["b"] == pytest.approx(math.log(mass), abs=TOLERANCE)
    session, _ = runtime._need()
    most = session.facts.most_tokens
    assert most is not None
    # What is said to fit does, and one token more does not.
    [whole] = runtime.logprobs([[7] * most], [5])
    [longer] = runtime.logprobs([[7] * (most + 1)], [5])
    assert (whole.error, len(whole.log_probabilities)) == (None, 1)
    assert f"the model's context length leaves room for {most}" in (longer.error or "")
    for how in ("head", "tail", "middle"):
        [found] = runtime.classify(["word " * 5000], ["b", "c"], truncate=how, template="T: {text}\nL:")
        assert found.error is None
        assert 0.9 * most <= found.tokens <= most
        assert found.cut_characters > 10000
    assert "context length" in (runtime.classify(["word " * 5000], ["b", "c"])[0].error or "")


def test_async_streams_and_frames(runtime: Runtime) -> None:
    texts = [f"text number {i}" for i in range(40)]
    expected = [result.label for result in runtime.classify(texts, ["b", "c"])]

    async def ask() -> None:
        both = await asyncio.gather(
            runtime.aclassify(texts, ["b", "c"]), runtime.aclassify(polars.DataFrame({"text": texts}), ["b", "c"])
        )
        assert [result.label for result in both[0]] == expected
        assert both[1]["label"].to_list() == expected
        assert [result.label async for result in runtime.astream(iter(texts), ["b", "c"])] == expected
        assert (await runtime.ascore("a", ["b"], [5, 6])) == runtime.score("a", ["b"], [5, 6])
        assert (await runtime.alogprobs(["a"], [5, 6])) == runtime.logprobs(["a"], [5, 6])
        assert (await runtime.arerank("a", ["b", "c"]))[0].score is not None

    asyncio.run(ask())
    assert [result.label for result in runtime.classify(iter(texts), ["b", "c"])] == expected


def test_tokens_are_made_here_and_are_the_servers(runtime: Runtime) -> None:
    session, loop = runtime._need()
    assert isinstance(session.tokens, LocalTokens)
    assert session.client is not None
    texts = ["naïve\n\n  x", "", "<s> and </s>"]
    assert loop.run(session.tokens.encode(texts)) == loop.run(ServerTokens(session.client).encode(texts))


def test_few_shot_prefix_is_computed_once_a_rank(runtime: Runtime) -> None:
    shots = [(f"example number {i} of its kind", "b" if i % 2 else "c") for i in range(24)]
    runtime.totals.__init__()  # type: ignore[misc]
    found = runtime.classify([f"row {i} of some" for i in range(400)], ["b", "c"], examples=shots)
    totals = runtime.totals
    prompt = found[0].tokens
    assert prompt > 300
    # All but the first prompt of each rank can have the shared pages from the cache.
    assert totals.cached >= 0.95 * totals.possible_cached
    assert totals.possible_cached >= 398 * (prompt - 40) // 16 * 16
    assert totals.flops < 0.3 * totals.full_flops


def test_a_file_is_labelled(runtime: Runtime, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": f"text number {i}", "label": "b" if i % 2 else "c"} for i in range(50)]
    lines = [json.dumps(row) for row in rows]
    lines[7] = "broken"
    lines[9] = json.dumps({"text": "word " * 5000, "label": "b"})
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    (tmp_path / "neutral.jsonl").write_text(json.dumps({"text": "N/A"}))
    out = tmp_path / "out.jsonl"
    arguments = [str(tmp_path / "in.jsonl"), str(out), "--labels", "b,c", "--gold-field", "label", "--url", runtime.url]
    calibration = ["--calibration", str(tmp_path / "neutral.jsonl"), "--peak-tflops", "0.1"]
    assert main(["classify", *arguments, *calibration]) == 0
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert [result["row"] for result in results] == list(range(50))
    assert [result["row"] for result in results if "error" in result] == [7, 9]
    assert "context length" in results[9]["error"]
    assert all(
        sum(result["probabilities"].values()) == pytest.approx(1, abs=1e-5) for result in results if "label" in result
    )
    printed = capsys.readouterr().out
    assert "accuracy 0." in printed
    assert "50 rows, 2 with errors" in printed
    figures = json.loads(printed.splitlines()[-1])
    assert (figures["rows"], figures["errors"], figures["runs"]) == (50, 2, 1)
    assert 0 < figures["mfu"] < 1
    assert "Confusion" in (tmp_path / "out.jsonl.html").read_text()


def test_results_go_to_rows_by_place(runtime: Runtime) -> None:
    one, two = pandas.DataFrame({"text": ["a cat", "two dogs"]}), pandas.DataFrame({"text": ["no", "some text"]})
    both = pandas.concat([one, two])
    found = runtime.classify(both, ["b", "c"])
    expected = runtime.classify(both["text"].tolist(), ["b", "c"])
    assert found["text"].tolist() == both["text"].tolist()
    assert found["p_b"].tolist() == pytest.approx([result.probabilities["b"] for result in expected], abs=TOLERANCE)
    before = runtime.totals.prompts
    for wrong in (both, {"text": ["a cat"]}, {"a cat"}, "a cat", 5):
        with pytest.raises(OptionError, match="texts: an iterator of strings is needed"):
            runtime.astream(wrong, ["b", "c"])
    for wrong in ({"a cat"}, "a cat", 5):
        with pytest.raises(OptionError, match="texts: a list of strings or a frame is needed"):
            runtime.classify(wrong, ["b", "c"])
    with pytest.raises(OptionError, match="already has the column"):
        runtime.classify(found, ["b", "c"])
    assert runtime.totals.prompts == before


def test_calls_at_once_are_planned_together(runtime: Runtime) -> None:
    texts = [f"text number {i} of many" for i in range(100)]
    expected = runtime.classify(texts, ["b", "c"])

    async def ask() -> list[Any]:
        return await asyncio.gather(*(runtime.aclassify([text], ["b", "c"]) for text in texts))

    for [answer], other in zip(asyncio.run(ask()), expected, strict=True):
        assert answer.log_probabilities == pytest.approx(other.log_probabilities, abs=TOLERANCE)


# A model of random weights gives any label next to no probability.
NO_WARNINGS = ("-W", "ignore::UserWarning")
PROGRAM = """
import os, signal, sys
from asyncep import Runtime, ServerError

model, certificate, key = sys.argv[1:]
runtime = Runtime(model, log_level="error", ssl_certfile=certificate, ssl_keyfile=key).start()
print(len(runtime.classify(["x"], ["b", "c"])))
os.kill(runtime._process.pid, signal.SIGKILL)
try:
    # Its other processes end a moment later, and may answer until then.
    while True:
        runtime.classify(["y"], ["b", "c"])
except ServerError as error:
    print(error)
"""


def test_a_killed_server_is_named_and_a_program_that_never_closes_ends_quietly(model: Path, tmp_path: Path) -> None:
    """With a certificate of its own: the runtime trusts what it has given its server."""
    done = subprocess.run(
        [sys.executable, *NO_WARNINGS, "-c", PROGRAM, str(model), *map(str, own_certificate(tmp_path))],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    one, *error = done.stdout.splitlines()
    assert one == "1"
    assert re.search(r"the server that was started here \(process \d+\) was killed by SIGKILL; start a new", error[0])
    told = done.stderr.splitlines()
    assert told[0] == f"asyncep: starting {model} with 1 rank(s) …"
    assert all(re.match("asyncep: (starting|still starting after|ready after)", line) for line in told), done.stderr
    assert re.search(r"ready after \d+ s at https://127\.0\.0\.1:\d+$", told[-1])


LEFT_OPEN = """
import contextlib, sys, threading
from asyncep import Runtime

runtime = Runtime.connect(sys.argv[1]).start()
print(len(runtime.classify(["x"], ["b", "c"])))
endless = iter(lambda: "text", None)
stream = runtime.classify(endless, ["b", "c"])
print(next(stream).error)

def call():
    # It is told that the runtime is closed under it.
    with contextlib.suppress(BaseException):
        runtime.classify([f"row {i}" for i in range(100_000)], ["b", "c"])

threading.Thread(target=call, daemon=True).start()
"""


def test_a_program_that_ends_in_the_middle_ends_quietly(runtime: Runtime) -> None:
    """With a stream open and a call under way."""
    command = [sys.executable, *NO_WARNINGS, "-c", LEFT_OPEN, runtime.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["1", "None"], "")


def test_the_server_lets_large_calls_wait(runtime: Runtime) -> None:
    session, _ = runtime._need()
    assert session.facts.priorities
    assert isinstance(session.scorer._behind, Behind)
    assert len(runtime.classify([f"row {i}" for i in range(INTERACTIVE_PROMPTS + 1)], ["b", "c"])) == 65


def test_a_killed_job_goes_on(runtime: Runtime, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"this is text {i % 700}"}) + "\n" for i in range(800)]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    out = tmp_path / "out.parquet"
    command = [sys.executable, "-m", "asyncep", "classify", str(tmp_path / "in.jsonl"), str(out), "--labels", "b,c"]
    command += ["--url", runtime.url, "--part-rows", "150", "--no-report"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        folder = tmp_path / "out.parquet.job"
        # Looking into another process' folder: there is nothing to wait on.
        while process.poll() is None and len(list(folder.glob("part-*[0-9]"))) < 2:
            pass
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    frame = polars.read_parquet(out)
    assert frame["row"].to_list() == list(range(800))
    assert frame["label"].null_count() == 0
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["runs"] == 2
    # What the first run committed was not computed again, and 100 texts are there twice.
    assert 700 <= figures["prompts_computed"] <= 1100
    expected = [result.label for result in runtime.classify([json.loads(line)["text"] for line in lines], ["b", "c"])]
    assert sum(a != b for a, b in zip(frame["label"].to_list(), expected, strict=True)) == 0


def test_a_rank_that_is_killed_costs_no_row(runtime: Runtime, tmp_path: Path) -> None:
    texts = [f"this is row {i} of a longer job" for i in range(3000)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    killed: list[int] = []
    pid = httpx.get(runtime.url + "/asyncep/status", timeout=30).json()["ranks"][0]["pid"]

    def kill(progress: Progress) -> None:
        if progress.rows and not killed:
            killed.append(pid)
            os.kill(pid, signal.SIGKILL)

    job = runtime.classify_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl", ["b", "c"], on_progress=kill)
    assert killed
    assert (job.summary.rows, job.summary.errors) == (3000, 0)


def test_examples_of_the_docstrings(runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    finder = doctest.DocTestFinder()
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    globs = {**vars(runtime_module), "asyncio": asyncio, "runtime": runtime}
    for written in runtime_module.Runtime.__mro__[:-1]:
        for test in finder.find(written, written.__name__, globs=globs):
            runner.run(test)
    assert runner.tries >= 8
    assert runner.failures == 0


def test_a_users_program(runtime: Runtime, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(public_api_program.classified(runtime)) == 6
    scores, ranked, logs = public_api_program.asked(runtime)
    assert [len(scores), len(ranked), len(logs)] == [2, 1, 1]
    assert [answer.error for answer in asyncio.run(public_api_program.awaited(runtime))] == [None] * 4
    assert public_api_program.job(runtime, tmp_path).summary.rows == 2
    said = capsys.readouterr().out.splitlines()
    assert "gone.csv" in said[0]
    assert "overwrite=True" in said[1]
    assert public_api_program.connected(runtime.url) == 0
    assert len(asyncio.run(public_api_program.connected_too(runtime.url))) == 1
    assert public_api_program.judged(runtime) == 2
    assert "labels: at least two" in public_api_program.refused(runtime)
    answers = [*scores, *ranked, *logs, *runtime.classify(["one", ""], ["a", "b"])]
    plain = [json.loads(json.dumps(answer.to_dict())) for answer in answers]
    assert all("error" in each for each in plain)
    assert set(plain[-2]["probabilities"]) == {"a", "b"}
    assert repr(Runtime.connect("http://me:secret@host:1")) == "<Runtime.connect('http://host:1'), not started>"


def test_everything_public_is_there() -> None:
    assert all(getattr(asyncep, name) is not None for name in asyncep.__all__)
    assert set(asyncep.__all__) <= set(dir(asyncep))
    used = set(vars(public_api_program)) | {"__version__"}
    assert set(asyncep.__all__) <= used, "the user's program leaves something of the public API out"
    methods = {name for name in dir(Runtime) if not name.startswith("_")}
    program = Path(public_api_program.__file__).read_text()
    assert {name for name in methods if f".{name}" not in program} == set()
    assert (Path(asyncep.__file__).parent / "py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'Runtimes'"):
        _ = asyncep.Runtimes  # type: ignore[attr-defined]


def test_examples_of_the_page(runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "jobs.md").read_text(), re.S)
    assert len(blocks) >= 4
    scope: dict[str, Any] = {}
    for block in blocks:
        # The one thing that is not as on the page: the ranks run already.
        code = block.replace('Runtime("MODEL", dp_size=2)', f'Runtime.connect("{runtime.url}")')
        exec(compile(code, "docs/use/jobs.md", "exec"), scope)
    assert Path("labelled.parquet").exists()
