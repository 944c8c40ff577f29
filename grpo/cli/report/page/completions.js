// The browser of completions: a step, its prompts, and all completions of one of them side by side.

const MOST_GROUPS = 400; // listed at once
const current = { groups: [], of: null, search: 0, view: null };

function stepsOf(run) {
  return runs[run].steps;
}

function completionsView() {
  const withSteps = runs.find((run) => run.steps.length);
  if (!withSteps) return h("section.view", {}, h("p.empty", {}, isLive ? "No completions are saved yet." : "No completions are saved in this run folder."));
  if (!stepsOf(browsing.run).length) browsing.run = withSteps.number;
  const known = stepsOf(browsing.run);
  if (!known.some((one) => one.step === browsing.step)) browsing.step = (known.findLast((one) => one.kept) ?? known[known.length - 1]).step;
  current.view = {
    steps: h("div.toolbar.steps"), list: h("nav.prompts", { "aria-label": "prompts" }), notes: h("div.notes"),
    group: h("div.group"), filters: filterBar(() => showCompletions({ keepsGroup: true })), legend: h("div.legend"),
  };
  const { steps, list, notes, group, filters, legend } = current.view;
  const view = h("section.view.browser", {}, steps, filters, legend, h("div.panes", {}, h("div.side", {}, list, notes), group));
  showCompletions({ keepsGroup: true });
  return view;
}

// Reads the groups of the chosen step, or of all steps, and shows those that pass the filters.
async function showCompletions({ keepsGroup = false } = {}) {
  const search = (current.search += 1);
  if (!keepsGroup) browsing.group = 0;
  showStepBar();
  showLegend();
  const isEverywhere = browsing.isEverywhere;
  const steps = isEverywhere ? stepsOf(browsing.run).filter((one) => one.kept) : [{ step: browsing.step }];
  const groups = [];
  current.of = null;
  for (const { step } of steps) {
    const part = await completionsOf(browsing.run, step);
    if (search !== current.search) return; // something else was chosen meanwhile
    if (!part) continue;
    if (!isEverywhere) current.of = part.of;
    groups.push(...(isEverywhere ? chosenGroups(part.groups).map((one) => one.group) : part.groups));
    if (isEverywhere && groups.length >= MOST_GROUPS) break;
  }
  current.groups = chosenGroups(groups);
  browsing.group = Math.max(0, Math.min(browsing.group, current.groups.length - 1));
  showList();
  showGroup();
}

function showStepBar() {
  const known = stepsOf(browsing.run);
  const place = known.findIndex((one) => one.step === browsing.step);
  const go = (to) => known[to] && goToStep(known[to].step);
  const slider = h("input", { type: "range", id: "step", min: 0, max: known.length - 1, value: place, "aria-label": "step", oninput: () => go(Number(slider.value)) });
  const at = known[place];
  const ofRuns = runs.length > 1 ? select("run", runs.map((run) => [run.number, run.name]), browsing.run, (run) => chooseRun(Number(run))) : null;
  fill(current.view.steps, ofRuns, h("strong.at", {}, `step ${at.step}`),
    h("span.travel", {}, button("‹", "previous saved step ([)", () => go(place - 1)), slider, button("›", "next saved step (])", () => go(place + 1))),
    h("span.label", {}, `${plural(known.length, "saved step")}, ${plural(at.groups, "prompt")} × ${number(at.completions / Math.max(1, at.groups), 3)}`));
}

function chooseRun(run) {
  browsing.run = run;
  const known = stepsOf(run);
  if (known.length && !known.some((one) => one.step === browsing.step)) browsing.step = known[known.length - 1].step;
  showCompletions({ keepsGroup: true });
}

function goToStep(step) {
  browsing.step = step;
  showCompletions({ keepsGroup: !browsing.isOverSteps });
  remember("step", step);
}

function showLegend() {
  const { legend } = current.view;
  const { no_tokens: reason } = runs[browsing.run];
  legend.hidden = browsing.colouring === "none" && !reason;
  if (reason) return fill(legend, visible(reason));
  const scale = Array.from({ length: 10 }, (_, level) => h(`span.t.p${level}`, {}, "\u00a0"));
  const texts = {
    none: [],
    logprob: ["log-probability when sampled: ", h("span.label", {}, "likely "), h("span.scale", {}, scale), h("span.label", {}, " −4.5 and below"), ", given tokens are ", h("span.t.given", {}, "grey")],
    advantage: ["advantage of the completion: ", h("span.t.up", {}, "above"), " or ", h("span.t.down", {}, "below"), " its group; stronger colour, larger advantage"],
    given: [h("span.t.given", {}, "given tokens"), " were not sampled: results of tools, turns of the environment, the template's text between turns"],
  };
  legend.style.setProperty("--strength", "36%");
  return fill(legend, texts[browsing.colouring]);
}

// ------------------------------------------------------------------------------------------------------------- prompts

function showList() {
  const { list, notes } = current.view;
  const rewards = current.groups.flatMap(({ group }) => group.completions.map((one) => one.reward)).filter(Number.isFinite);
  const [least, most] = [Math.min(...rewards, Infinity), Math.max(...rewards, -Infinity)];
  fill(list, current.groups.slice(0, MOST_GROUPS).map((one, place) => listItem(one, place, least, most)));
  const step = stepsOf(browsing.run).find((one) => one.step === browsing.step);
  const texts = [];
  if (!current.groups.length) texts.push(step.kept || isLive ? "No completion passes the filters." : "This page has no completions of this step.");
  if (current.groups.length >= MOST_GROUPS) texts.push(`The first ${MOST_GROUPS} prompts are listed.`);
  if (!browsing.isEverywhere && step.kept < step.completions && !isLive) {
    texts.push(`${step.kept} of ${step.completions} completions of this step are in the page, to keep it small.`);
  }
  texts.push(leftOut(runs[browsing.run]));
  fill(notes, texts.filter(Boolean).map((text) => h("p", {}, text)));
}

// What a run has saved and the page does not hold.
function leftOut(run) {
  if (isLive) return null;
  const [kept, all] = ["kept", "completions"].map((name) => run.steps.reduce((sum, step) => sum + step[name], 0));
  if (kept === all) return null;
  const whole = run.steps.filter((step) => step.kept === step.completions).length;
  const none = run.steps.filter((step) => !step.kept).length;
  return `To stay small, this page has ${kept.toLocaleString("en")} of ${plural(all, "saved completion")}: all of ${plural(whole, "step")}, ` +
    `some of ${plural(run.steps.length - whole - none, "step")}, none of ${plural(none, "step")}. The run folder has all of them.`;
}

function listItem({ group, found }, place, least, most) {
  const dots = group.completions.map((completion) => {
    const dot = h("i.dot", { title: decimal(completion.reward, 3) });
    const share = most > least ? (completion.reward - least) / (most - least) : completion.reward > 0 ? 1 : 0;
    dot.style.setProperty("--share", `${Math.round(100 * (completion.reward === null ? 0 : share))}%`);
    return dot;
  });
  const part = isFiltered() && found.length < group.completions.length ? `${found.length} of ${group.completions.length}` : "";
  return h("button.item", { type: "button", "aria-current": place === browsing.group ? "true" : "false", onclick: () => chooseGroup(place) },
    h("span.asked", { dir: "auto" }, visible(promptEnd(group.prompt))),
    h("span.below", {}, browsing.isEverywhere ? h("span.label", {}, `step ${group.step}`) : null, h("span.dots", {}, dots.slice(0, 32)),
      h("span.label", {}, part), h("b", {}, decimal(mean(group.completions.map((one) => one.reward))))));
}

function chooseGroup(place) {
  if (place < 0 || place >= current.groups.length) return;
  browsing.group = place;
  [...current.view.list.children].forEach((item, n) => item.setAttribute("aria-current", String(n === place)));
  current.view.list.children[place]?.scrollIntoView({ block: "nearest" });
  showGroup();
}

// ----------------------------------------------------------------------------------------------------------- one group

function showGroup() {
  const { group: element } = current.view;
  const one = current.groups[browsing.group];
  if (!one) return fill(element);
  const { group, found } = one;
  const search = browsing.search.toLowerCase();
  const seen = occurrences(group.key);
  const over = seen.length > 1 ? button(`over ${seen.length} steps`, "the same prompt wherever it was saved (o)", toggleOverSteps, browsing.isOverSteps) : null;
  const rewards = group.completions.map((completion) => completion.reward);
  fill(element,
    h("header", {}, h("h2", {}, `Prompt ${group.number + 1}`), h("span.label", {}, `step ${group.step}, mean reward ${decimal(mean(rewards), 3)}`), h("span.space"), over),
    promptView(group, search),
    browsing.isOverSteps && seen.length > 1 ? overSteps(seen) : h("div.cards", {}, found.map(({ completion, place }) => card(completion, place, search))));
  return element;
}

function toggleOverSteps() {
  browsing.isOverSteps = !browsing.isOverSteps;
  showGroup();
}

function card(completion, place, search) {
  const { reward, advantage, finish, length, given, failure } = completion;
  const side = advantage > 0 ? "up" : advantage < 0 ? "down" : "even";
  const functions = Object.entries(completion.rewards);
  const extras = Object.entries(completion.extras).filter(([, value]) => value !== null);
  return h(`article.card.${side}`, {},
    h("header", {},
      h("b.reward", { title: "reward" }, decimal(reward)), h(`span.advantage.${side}`, { title: "advantage" }, signed(advantage)),
      h("span.space"), h(isTruncated(finish) || finish === "failed" ? "span.end.bad" : "span.end", { title: "how it ended" }, isTruncated(finish) ? `cut off: ${finish}` : finish ?? "–"),
      h("span.label", { title: "sampled tokens" }, `${plural(length ?? 0, "token")}${given ? ` + ${given} given` : ""}`), h("span.label.place", {}, `${place + 1}`)),
    functions.length > 1 ? h("div.functions", {}, functions.map(([name, value]) => h("span", {}, visible(name), " ", h("b", {}, decimal(value))))) : null,
    failure ? h("details.failure", {}, h("summary", {}, visible(failure.trim().split("\n").pop())), plainText(failure, "")) : null,
    clipped(completionText(completion, browsing.colouring, search), 420),
    extras.length ? h("details.extras", {}, h("summary", {}, "logged"), h("dl.data", {}, extras.map(([name, value]) =>
      h("div", {}, h("dt", {}, visible(name)), h("dd", { dir: "auto" }, visible(shortened(typeof value === "number" ? number(value) : value, 2000))))))) : null);
}
