"""The page in a real browser: what it shows of a run, and what clicks, keys and hostile text do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_runs import MadeRun

pytestmark = pytest.mark.slow

Make = Callable[..., MadeRun]
PageOf = Callable[..., Path]
COLOURS = "select[title^='colours']"
CARDS = ".cards .card"

HOSTILE = [
    "<script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">",
    "</script><script>document.title = 'taken'</script>",
    "{{ 7 * 7 }} ${document.title='taken'} </style><b>bold</b>",
    "one\u2028two\u2029three\u0000four\u202etxet desrever",
    "سلام hello שלום",
    "x" * 100_000,
]


def hostile_text(step: int, group: int, member: int) -> str:
    return HOSTILE[(group * 3 + member) % len(HOSTILE)]


@pytest.fixture
def finished(make_run: Make) -> MadeRun:
    """A run of twelve steps whose guards have acted."""
    run = make_run()
    run.play(5)
    run.guards["alarms"] += 1
    run.play(2)
    run.guards["skipped_steps"] += 1
    run.play(5)
    run.finish()
    return run


@pytest.fixture
def opened(browser: Any, finished: MadeRun, page_of: PageOf) -> Any:
    """The browser with the completions of that run."""
    browser.open(page_of(finished), "completions")
    browser.until(f"return document.querySelectorAll('{CARDS}').length === 4")
    return browser


# -------------------------------------------------------------------------------------------------------------- curves


def test_the_page_sums_a_run_up_and_draws_its_curves_without_any_request(
    browser: Any, finished: MadeRun, page_of: PageOf
) -> None:
    page = page_of(finished)
    browser.open(page)
    assert browser.texts("h1") == ["run"]
    figures = dict(zip(browser.texts(".figure .label"), browser.texts(".figure .value"), strict=True))
    assert (figures["evaluation"], figures["steps"], figures["state"]) == ("0.100 → 0.940", "12", "finished")
    assert figures["guards"] == "1 alarm, 1 skip"
    assert "rank" in " ".join(browser.texts(".facts dd")) and "effective step" in browser.texts(".facts dt")
    titles = browser.texts(".chart .title")
    wanted = ["Mean reward", "exact", "format", "Length", "Entropy", "Sampler gap (KL)", "Gradient norm", "Learning rate"]
    assert set(wanted) | {"Seconds by phase", "Tokens per second", "Memory in MiB"} <= set(titles)
    image = "c.getContext('2d').getImageData(0, 0, c.width, c.height).data"
    assert browser.run(f"const c = document.querySelector('.chart canvas'); return {image}.some((value) => value > 0)")
    assert browser.texts(".event") == ["step 6: alarm", "step 8: update skipped"]
    browser.collect()
    assert [url for url in browser.requests if not url.startswith(("data:", "about:"))] == [page.as_uri()]


def test_all_curves_show_their_values_at_the_step_under_the_cursor(opened: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    opened.press("1")
    area = opened.find(".chart.wide .u-over")
    ActionChains(opened.driver).move_to_element(area).perform()
    opened.until("return document.querySelector('.chart.wide .at').textContent === 'step 6'")
    entropy = "[...document.querySelectorAll('.chart')].find((c) => c.querySelector('.title').textContent === 'Entropy')"
    assert opened.run(f"return {entropy}.querySelector('.at').textContent") == "step 6"
    assert opened.run(f"return {entropy}.querySelector('.legend b').textContent") == "0.333"


def test_dragging_zooms_all_curves_and_a_double_click_shows_all_steps(opened: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    opened.press("1")
    reset = "return document.getElementById('reset').hidden"
    assert opened.run(reset)
    area = opened.find(".chart.wide .u-over")
    actions = ActionChains(opened.driver).move_to_element_with_offset(area, -200, 0).click_and_hold()
    actions.move_by_offset(150, 0).release().perform()
    opened.until(f"{reset} === false")
    ActionChains(opened.driver).double_click(area).perform()
    opened.until(reset)


def test_smoothing_and_the_logarithmic_scale(opened: Any) -> None:
    opened.press("1")
    script = "const s = document.querySelector('.smoothing input'); s.value = 4; s.dispatchEvent(new Event('input'))"
    opened.run(script)
    assert opened.texts(".smoothing output") == ["4 steps"]
    opened.press("l")
    pressed = opened.run("return [...document.querySelectorAll('[aria-pressed=true]')].map((b) => b.textContent)")
    assert pressed[0] == "log scale" and len(pressed) > 10, "all plots have changed"


def test_metrics_that_no_section_has_are_shown_on_request(opened: Any) -> None:
    opened.press("1")
    assert "mine/metric" not in opened.texts(".chart .title")
    opened.click(".others > summary")
    opened.until("return document.querySelectorAll('.others canvas').length > 0")
    assert "mine/metric" in opened.texts(".chart .title")


def test_evaluations_have_the_band_of_their_interval_and_pass_at_k(opened: Any) -> None:
    opened.press("1")
    titles = opened.texts(".chart .title")
    assert "Pass@k" in titles
    charts = "[...document.querySelectorAll('.chart')]"
    attempts = f"{charts}.find((one) => one.querySelector('.title').textContent === 'Pass@k')"
    names = opened.run(f"return [...{attempts}.querySelectorAll('.legend .name')].map((one) => one.textContent)")
    assert names == ["pass@1", "pass@4", "maj@4"]
    opened.click(".others > summary")
    opened.until("return document.querySelectorAll('.others canvas').length > 0")
    assert not [title for title in opened.texts(".others .title") if title.startswith("eval_")], "none is left over"
    pale = (
        "const shade = (title) => {"
        f"  const c = {charts}.find((one) => one.querySelector('.title').textContent === title).querySelector('canvas');"
        "  const data = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "  return data.filter((value, place) => place % 4 === 3 && value > 30 && value < 46).length; };"
        "return [shade('Mean reward'), shade('Entropy')]"
    )
    band, without = opened.run(pale)
    assert band > 1000 > 100 > without


# --------------------------------------------------------------------------------------------------------- completions


def test_a_step_shows_its_prompts_and_the_completions_of_one_side_by_side(opened: Any) -> None:
    assert opened.texts(".steps .at") == ["step 12"]
    assert opened.texts(".asked") == [f"What is {n} + {n}?" for n in (1, 2, 3)]
    assert opened.texts(".group .prompt .data dd") == ["2"], "the columns of the data"
    assert all(text in ("1.00", "0.00") for text in opened.texts(".card .reward"))
    assert opened.texts(".card .end")[:2] == ["stop", "cut off: length"]
    assert len(opened.texts(".card .functions")) == 4
    boxes = opened.run("return [...document.querySelectorAll('.card')].map((c) => c.getBoundingClientRect().top)")
    assert boxes[0] == boxes[1], "side by side"


def test_keys_go_through_steps_and_prompts(opened: Any) -> None:
    opened.press("[", "[")
    opened.until("return document.querySelector('.steps .at').textContent === 'step 10'")
    opened.press("j", "j", "k")
    assert opened.texts(".group h2") == ["Prompt 2"]
    opened.press("]")
    opened.until("return document.querySelector('.steps .at').textContent === 'step 11'")
    opened.press("?")
    assert opened.run("return document.querySelector('dialog').open")
    opened.click("dialog button")
    opened.press("3")
    assert opened.texts("[aria-current=page]") == ["Configuration"]


def test_filters_leave_the_completions_that_they_ask_for(opened: Any) -> None:
    opened.choose("select[title='how it ended']", "truncated")
    opened.until(f"return document.querySelectorAll('{CARDS}').length === 1")
    assert opened.texts(".card .end") == ["cut off: length"]
    opened.choose("select[title='how it ended']", "")
    opened.click("#everywhere")
    opened.type("#below", "0.5")
    opened.until("return [...document.querySelectorAll('.card .reward')].every((e) => e.textContent === '0.00')")
    steps = opened.texts(".prompts .below .label")
    assert "step 1" in steps, "of all steps"
    opened.type("#below", "-1")
    opened.until("return document.querySelector('.notes').textContent.includes('No completion passes')")


def test_search_marks_what_it_finds_in_prompts_and_completions(opened: Any) -> None:
    opened.press("/")
    opened.press("3 + 3")
    opened.until("return document.querySelectorAll('.prompts .item').length === 1")
    assert opened.texts("mark") == ["3 + 3"]
    opened.type("#search", "carry")
    opened.until("return document.querySelector('.card mark')")
    assert {text.lower() for text in opened.texts(".card mark")} == {"carry"}


def test_completions_are_sorted_by_reward_and_length(opened: Any) -> None:
    opened.choose("select[title='order']", "reward-up")
    opened.until("return true")
    rewards = [float(text) for text in opened.texts(".card .reward")]
    assert rewards == sorted(rewards)
    groups = [float(text) for text in opened.texts(".prompts .below b")]
    assert groups == sorted(groups)


def test_tokens_have_colours_and_say_how_likely_they_were(opened: Any) -> None:
    text = opened.texts(".card .text")[0]
    opened.choose(COLOURS, "logprob")
    opened.until("return document.querySelector('.card .tokens')")
    assert opened.texts(".card .tokens")[0] == text
    assert opened.run("return new Set([...document.querySelectorAll('.card .t')].map((t) => t.className)).size") > 3
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(opened.driver).move_to_element(opened.find(".card .t")).perform()
    opened.until("return document.querySelector('.card .t').title.includes('log p')")
    opened.choose(COLOURS, "advantage")
    opened.until("return document.querySelector('.card .t.up, .card .t.down')")


def test_the_same_prompt_over_the_steps(opened: Any) -> None:
    opened.press("o")
    opened.until("return document.querySelectorAll('.column .card').length > 0")
    opened.until("return [...document.querySelectorAll('.column')].every((c) => c.childElementCount)")
    headings = opened.texts(".column h3")
    assert len(headings) > 3 and headings == sorted(headings, key=lambda text: int(text.split()[1]))
    assert len(opened.texts(".column .card")) == 3 * len(headings)
    opened.click(".column > .more")
    assert len(opened.texts(".column .card")) == 3 * len(headings) + 1


def test_calls_of_tools_are_a_dialogue_and_given_tokens_are_grey(browser: Any, make_run: Make, page_of: PageOf) -> None:
    run = make_run(is_episode=True)
    run.play(1)
    run.finish()
    browser.open(page_of(run), "completions")
    browser.until("return document.querySelector('.card .dialogue')")
    assert browser.texts(".card .call")[0] == "add(a=1, b=2)"
    assert browser.texts(".card:first-child .role") == ["assistant", "add", "assistant"]
    browser.choose(COLOURS, "given")
    browser.until("return document.querySelector('.card .tokens')")
    assert len(browser.texts(".card:first-child .t.given")) == 3


def test_hostile_text_stays_text(browser: Any, make_run: Make, page_of: PageOf) -> None:
    run = make_run(text_of=hostile_text, groups=2, completions=3)
    run.play(1)
    run.finish()
    browser.open(page_of(run), "completions")
    browser.until("return document.querySelectorAll('.card').length === 3")
    title = browser.driver.title
    shown = browser.texts(".card .text")
    browser.press("j")
    browser.until("return document.querySelector('.group h2').textContent === 'Prompt 2'")
    shown += browser.texts(".card .text")
    assert shown[:3] == HOSTILE[:3]
    assert shown[3] == "one↵\ntwo↵\nthree␀four\u202etxet desrever"
    assert shown[4] == HOSTILE[4]
    assert shown[5] == "x" * 6000
    browser.run("[...document.querySelectorAll('button.more')].find((b) => b.textContent.includes('characters')).click()")
    assert len(browser.texts(".card .text")[2]) == 100_000
    for colouring in ("logprob", "advantage", "given"):
        browser.choose(COLOURS, colouring)
        browser.until("return document.querySelector('.card .tokens')")
    assert browser.run("return document.querySelectorAll('#page script, #page img, #page b b, #page style').length") == 0
    assert browser.driver.title == title == "run"
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth"), "a long line wraps"


# ------------------------------------------------------------------------------------------- several runs, looks, gaps


def test_two_runs_are_overlaid_and_their_configurations_compared(browser: Any, make_run: Make, page_of: PageOf) -> None:
    runs = [make_run("a"), make_run("b", seed=3, rate=5e-4)]
    for run in runs:
        run.play(6)
        run.finish()
    browser.open(page_of(*runs))
    assert browser.texts("table.compared tbody th")[:2] == ["a", "b"]
    names = "return [...document.querySelector('.chart.wide').querySelectorAll('.legend .name')].map((e) => e.textContent)"
    assert browser.run(names) == ["a training", "a evaluation", "b training", "b evaluation"]
    browser.click("button.run")
    assert browser.run(names) == ["training", "evaluation"], "of b alone"
    browser.press("3")
    keys = browser.texts("table.options tbody th")
    assert {"optim.learning_rate", "seed"} <= set(keys) and "lora.rank" not in keys
    browser.choose("select[title=options]", "all")
    assert "lora.rank" in browser.texts("table.options tbody th")
    browser.type("#search", "learning_rate")
    assert browser.texts("tr.differs td") == ["0.0001", "0.0005"]
    browser.press("\ue00c")  # Escape leaves the search
    browser.press("2", "o")
    browser.until("return document.querySelectorAll('.column').length > 1")
    assert len({text.partition(",")[0] for text in browser.texts(".column > header .label")}) == 2, "of both runs"


def test_light_dark_and_the_switch(browser: Any, finished: MadeRun, page_of: PageOf) -> None:
    background = "return getComputedStyle(document.body).backgroundColor"
    browser.open(page_of(finished), is_dark=True)
    dark = browser.run(background)
    browser.press("t")
    light = browser.run(background)
    browser.press("t")
    assert browser.run(background) == dark != light
    browser.run("try { localStorage.clear() } catch {}")


@pytest.mark.parametrize("view", ["curves", "completions", "configuration"])
def test_a_narrow_window_needs_no_scrolling_to_the_side(browser: Any, finished: MadeRun, page_of: PageOf, view: str) -> None:
    browser.open(page_of(finished), view, width=400)
    browser.until("return document.querySelector('.view').offsetHeight > 200")
    assert browser.run("return document.documentElement.scrollWidth") <= 400


def test_a_run_without_tokenizer_or_logprobs_says_what_is_missing(browser: Any, make_run: Make, page_of: PageOf) -> None:
    run = make_run(tokenizer=None)
    run.play(1)
    run.finish()
    browser.open(page_of(run), "completions")
    browser.until("return document.querySelector('.card')")
    assert browser.texts("section > .legend")[0].startswith("no tokenizer to show tokens with: ")
    browser.choose(COLOURS, "logprob")
    assert browser.texts(".card .text") and not browser.texts(".card .tokens")


def test_completions_saved_without_logprobs_are_shown(browser: Any, make_run: Make, page_of: PageOf) -> None:
    run = make_run(with_logprobs=False)
    run.play(1)
    run.finish()
    browser.open(page_of(run), "completions")
    browser.until("return document.querySelector('.card')")
    browser.choose(COLOURS, "logprob")
    browser.until("return document.querySelector('.card .tokens')")


def test_a_small_page_says_what_it_leaves_out(browser: Any, make_run: Make, page_of: PageOf) -> None:
    run = make_run(groups=6, words=400)
    run.play(10)
    run.finish()
    page = page_of(run, max_bytes=400_000)
    assert page.stat().st_size <= 400_000
    browser.open(page, "completions")
    browser.until("return document.querySelector('.card')")
    (note,) = [text for text in browser.texts(".notes p") if text.startswith("To stay small")]
    assert "of 240 saved completions" in note and "The run folder has all of them." in note


def test_a_run_without_steps_or_completions(browser: Any, make_run: Make, page_of: PageOf) -> None:
    browser.open(page_of(make_run()), "completions")
    assert browser.texts(".empty") == ["No completions are saved in this run folder."]
    browser.press("1")
    assert browser.texts(".chart .title") == ["Mean reward", "Pass@k", "Length"], "of the evaluation before training"
