// The runs of the page: colours, metrics, events of the guards, and the head of the page that sums them up.

const RUN_COLOURS = ["--c0", "--c1", "--c2", "--c3", "--c4", "--c5"];
let runs = []; // as in the index, with a Map of metrics

function colourOf(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function runColour(run) {
  return RUN_COLOURS[run % RUN_COLOURS.length];
}

function openRuns(index) {
  runs = index.runs.map((run, number) => ({ ...run, number, isShown: true, metrics: new Map(Object.entries(run.metrics)) }));
}

// Adds rows that a run has written since: columns of the same form.
function appendMetrics(run, columns) {
  for (const [name, [steps, values]] of Object.entries(columns)) {
    const [known, before] = run.metrics.get(name) ?? [[], []];
    run.metrics.set(name, [known.concat(steps), before.concat(values)]);
  }
}

function shownRuns() {
  return runs.filter((run) => run.isShown);
}

function metricNames() {
  return [...new Set(runs.flatMap((run) => [...run.metrics.keys()]))];
}

const EVENTS = [
  ["guards/restores", "rolled back", "--bad"],
  ["guards/halvings", "learning rate halved", "--warn"],
  ["guards/skipped_steps", "update skipped", "--bad"],
  ["guards/alarms", "alarm", "--warn"],
];

// Where a counter of the guards grew: [{step, text, colour}], the gravest of each step.
function guardEvents(run) {
  const found = new Map();
  for (const [name, text, colour] of EVENTS) {
    const [steps, values] = run.metrics.get(name) ?? [[], []];
    values.forEach((value, place) => {
      if (value > (values[place - 1] ?? 0) && !found.has(steps[place])) found.set(steps[place], { step: steps[place], text, colour });
    });
  }
  return [...found.values()].sort((a, b) => a.step - b.step);
}

// ---------------------------------------------------------------------------------------------------------- summary

function figures(run) {
  const { before, after, steps, max_steps: planned, seconds, peak_memory_bytes: memory, state } = run.headline;
  const gain = before !== null && after !== null ? after - before : null;
  const result = gain === null ? decimal(after ?? before, 3) : `${decimal(before, 3)} → ${decimal(after, 3)}`;
  return [
    ["evaluation", result, gain !== null ? signed(gain, 3) : before !== null ? "before training" : ""],
    ["steps", `${steps}`, planned && planned !== steps ? `of ${planned}` : ""],
    ["time", duration(seconds), seconds && steps ? `${duration(seconds / steps)} a step` : ""],
    ["peak memory", bytes(memory), ""],
    ["guards", guardsText(run), ""],
    ["state", state, ""],
  ];
}

function guardsText(run) {
  const words = { alarms: "alarm", skipped_steps: "skip", halvings: "halving", restores: "rollback" };
  const parts = Object.entries(run.headline.guards).map(([name, count]) => plural(count, words[name]));
  return parts.length ? parts.join(", ") : "quiet";
}

function summaryView() {
  return runs.length === 1 ? summaryOfOne(runs[0]) : summaryOfSeveral();
}

function summaryOfOne(run) {
  return h(
    "section.summary",
    {},
    h("div.figures", {}, figures(run).map(([label, value, note]) =>
      h("div.figure", {}, h("div.label", {}, label), h("div.value", {}, value), h("div.note", {}, note)))),
    h("details.facts", { open: innerWidth > 700 }, h("summary", {}, "about this run"),
      h("dl", {}, run.facts.map(([label, text]) => h("div", {}, h("dt", {}, label), h("dd", {}, visible(text)))))),
  );
}

function summaryOfSeveral() {
  const labels = figures(runs[0]).map(([label]) => label);
  const cells = (run) => figures(run).map(([, value, note]) => h("td", {}, value, note ? h("span.note", {}, ` ${note}`) : null));
  const facts = runs.map((run) => new Map(run.facts));
  const names = [...new Set(runs.flatMap((run) => run.facts.map(([label]) => label)))];
  const rows = names.map((name) => [name, facts.map((of) => of.get(name) ?? "–")]);
  const differing = rows.filter(([, texts]) => new Set(texts).size > 1);
  return h(
    "section.summary",
    {},
    h("div.scroll", {}, h("table.compared", {},
      h("thead", {}, h("tr", {}, h("th", {}, "run"), labels.map((label) => h("th", {}, label)))),
      h("tbody", {}, runs.map((run) => h("tr", {}, h("th", {}, swatch(runColour(run.number)), visible(run.name)), cells(run)))))),
    h("details.facts", {}, h("summary", {}, "what differs between these runs"),
      h("div.scroll", {}, h("table.compared", {},
        h("thead", {}, h("tr", {}, h("th", {}), runs.map((run) => h("th", {}, swatch(runColour(run.number)), visible(run.name))))),
        h("tbody", {}, differing.map(([name, texts]) => h("tr", {}, h("th", {}, name), texts.map((text) => h("td", {}, visible(text))))))))),
  );
}

function swatch(colour, kind = "line") {
  const element = h(`span.swatch.${kind}`);
  element.style.setProperty("--colour", `var(${colour})`);
  return element;
}
