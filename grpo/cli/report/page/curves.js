// The view of all curves: which plots there are, and the controls that they share.

const line = (metric, label, more = {}) => ({ metric, label, ...more });
const training = (metric) => line(metric, "training");
const evaluation = (metric, more = {}) => line(metric, "evaluation", { isPoints: true, colour: "--c1", ...more });
const alone = (title, metric, more = {}) => ({ title, lines: [line(metric, "")], ...more });

// The names of metrics that match, with what the pattern's group found: [[name, found], ...].
function matching(names, pattern) {
  return names.flatMap((name) => {
    const match = pattern.exec(name);
    return match ? [[name, match[1]]] : [];
  });
}

function rewardCharts(names) {
  const functions = matching(names, /^rewards\/(.*)\/mean$/);
  const sets = matching(names, /^eval_([^/]+)_reward$/);
  const isShare = shareOf(["reward", "eval_reward"]);
  return [
    { title: "Mean reward", lines: [training("reward"), evaluation("eval_reward", { band: boundsOf("eval_reward") })], isWide: true, isShare },
    ...(functions.length > 1 ? functions : []).map(([metric, name]) => ({
      title: name,
      lines: [training(metric), evaluation(`eval_rewards/${name}/mean`)],
      isShare: shareOf([metric]),
    })),
    ...(sets.length ? [{ title: "Evaluation by set", lines: sets.map(([metric, name]) => line(metric, name, { isPoints: true })) }] : []),
    ...["", ...sets.map(([, name]) => name)].flatMap((name) => attemptCharts(names, name)),
    alone("Spread within groups", "reward_std"),
    alone("Groups without variance", "frac_reward_zero_std", { isShare: true }),
  ];
}

// pass@k and maj@n of all prompts, or of a set.
function attemptCharts(names, set) {
  const prefix = set ? `eval_${set}_` : "eval_";
  const found = names.filter((name) => name.startsWith(prefix) && /^(pass|maj)@\d+$/.test(name.slice(prefix.length)));
  if (!found.length) return [];
  const lines = found.map((metric) => line(metric, metric.slice(prefix.length), { isPoints: true }));
  return [{ title: set ? `Pass@k, ${set}` : "Pass@k", lines, isShare: true }];
}

const boundsOf = (metric) => [`${metric}_low`, `${metric}_high`];

// Whether a metric is an end of the interval of another one.
function isBound(name, names) {
  const metric = name.replace(/_(low|high)$/, "");
  return metric !== name && boundsOf(metric).every((bound) => names.includes(bound)) && names.includes(metric);
}

// Whether all values of these metrics lie in [0, 1].
function shareOf(metrics) {
  const values = runs.flatMap((run) => metrics.flatMap((metric) => run.metrics.get(metric)?.[1] ?? [])).filter(Number.isFinite);
  return values.length > 0 && values.every((value) => value >= 0 && value <= 1);
}

function sections(names) {
  const phases = matching(names, /^time\/(.*)$/);
  const colours = ["--c0", "--c2", "--c1", "--c3", "--c4", "--c5"];
  return [
    ["Reward", rewardCharts(names)],
    ["Completions", [
      { title: "Length", lines: [line("completions/mean_length", "training"), evaluation("eval_completions/mean_length")] },
      { title: "Cut off", lines: [line("completions/clipped_ratio", "training"), evaluation("eval_completions/clipped_ratio")], isShare: true },
      alone("Turns", "episodes/mean_turns"),
      { title: "Tool calls", lines: [line("tools/call_frequency", "a completion"), line("tools/failure_frequency", "failed")] },
      alone("Given tokens", "episodes/mean_given_tokens"),
      alone("Void episodes", "episodes/failed", { isShare: true }),
    ]],
    ["Policy", [
      alone("Entropy", "entropy"),
      alone("Sampler gap (KL)", "sampling/kl"),
      alone("Sampler gap (mean |Δ log p|)", "sampling/sampling_logp_difference/mean"),
      alone("Gradient norm", "grad_norm"),
      alone("Learning rate", "learning_rate"),
      alone("KL to the reference", "kl"),
      alone("Loss", "loss"),
      { title: "Clipped tokens", lines: [line("clip_ratio/low_mean", "low"), line("clip_ratio/high_mean", "high")] },
    ]],
    ["Speed and memory", [
      { title: "Seconds by phase", lines: phases.map(([metric, name], place) => line(metric, name, { colour: colours[place % 6] })), isStacked: true },
      { title: "Tokens per second", lines: [line("tokens_per_second/rollout", "rollout"), line("tokens_per_second/train", "train")] },
      { title: "Memory in MiB", lines: matching(names, /^memory\/(.*)_mib$/).map(([metric, name]) => line(metric, name)) },
    ]],
  ];
}

// A plot for each metric that no section shows.
function otherCharts(names, shown) {
  const known = new Set(shown.flatMap((spec) => spec.lines.map((one) => one.metric)));
  return names.filter((name) => !known.has(name) && !isBound(name, names)).sort().map((name) => alone(name, name));
}

function curvesView() {
  for (const chart of [...charts]) chart.remove();
  const names = metricNames();
  const all = sections(names);
  const blocks = all.map(([title, specs]) => chartSection(title, specs.filter((spec) => spec.lines.some((one) => names.includes(one.metric)))));
  const others = otherCharts(names, all.flatMap(([, specs]) => specs));
  const grid = h("div.charts");
  const rest = h("details.others", { ontoggle: () => showOthers(rest, grid, others) }, h("summary", {}, `${plural(others.length, "other metric")}`), grid);
  const view = h("section.view.curves", {}, toolbar(), eventsLine(), blocks, others.length ? rest : null);
  new ResizeObserver(debounced(30, () => charts.forEach((chart) => chart.resize()))).observe(view);
  return view;
}

function chartSection(title, specs) {
  if (!specs.length) return null;
  return h("section.block", {}, h("h2", {}, title), h("div.charts", {}, specs.map((spec) => new Chart(spec).element)));
}

function showOthers(details, grid, specs) {
  if (!details.open || grid.childElementCount) return;
  const made = specs.map((spec) => new Chart(spec));
  fill(grid, made.map((chart) => chart.element));
  made.forEach((chart) => chart.draw());
}

function drawCharts() {
  charts.forEach((chart) => chart.draw());
}

function toolbar() {
  const [first, last] = fullRange();
  const output = h("output", {}, smoothingText());
  const slider = h("input", {
    type: "range", min: 1, max: Math.max(2, Math.floor((last - first) / 2)), value: windowSize(), title: "mean over this many steps",
    oninput: () => {
      plotting.smoothing = Number(slider.value);
      output.textContent = smoothingText();
      drawCharts();
    },
  });
  const log = button("log scale", "logarithmic scale of all plots (l)", toggleLog, plotting.isLog);
  log.id = "log";
  const reset = button("reset zoom", "show all steps (double click)", () => zoomTo(null));
  reset.id = "reset";
  reset.hidden = plotting.zoom === null;
  onZoom = () => (reset.hidden = plotting.zoom === null);
  const shown = runs.length > 1 ? h("span.runs", {}, runs.map(runToggle)) : null;
  return h("div.toolbar", {}, h("label.field.smoothing", {}, h("span", {}, "smoothing"), slider, output), log, reset, h("span.space"), shown);
}

function smoothingText() {
  return windowSize() > 1 ? `${windowSize()} steps` : "off";
}

function toggleLog() {
  plotting.isLog = !plotting.isLog;
  document.getElementById("log")?.setAttribute("aria-pressed", String(plotting.isLog));
  charts.forEach((chart) => chart.setLog(plotting.isLog));
}

function runToggle(run) {
  const element = h("button.run", {
    type: "button", title: "show or hide this run", "aria-pressed": String(run.isShown),
    onclick: () => {
      run.isShown = !run.isShown;
      element.setAttribute("aria-pressed", String(run.isShown));
      drawCharts();
    },
  }, swatch(runColour(run.number)), visible(run.name));
  return element;
}

// What the guards did, in words: the marks in the plots.
function eventsLine() {
  const events = runs.flatMap((run) => guardEvents(run).map((event) => ({ ...event, run })));
  if (!events.length) return null;
  const most = 12;
  const texts = events.slice(0, most).map((event) =>
    h("span.event", {}, swatch(event.colour, "mark"), `step ${event.step}: ${event.text}`, runs.length > 1 ? ` (${visible(event.run.name)})` : ""));
  return h("p.events", {}, h("span.label", {}, "guards"), texts, events.length > most ? h("span", {}, `and ${events.length - most} more`) : null);
}
