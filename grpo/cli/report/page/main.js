// The page: head, summary, and one of three views.

const VIEWS = [
  ["curves", "Curves", curvesView],
  ["completions", "Completions", completionsView],
  ["configuration", "Configuration", configurationView],
];
const shown = { view: null, element: h("main"), tabs: h("nav.tabs", { "aria-label": "views" }), summary: h("div") };

function showView(name) {
  const [key, , make] = VIEWS.find(([key]) => key === name) ?? VIEWS[0];
  shown.view = key;
  for (const tab of shown.tabs.children) tab.setAttribute("aria-current", tab.dataset.view === key ? "page" : "false");
  shown.summary.hidden = key !== "curves";
  if (key !== "completions") current.view = null;
  fill(shown.element, make());
  if (key === "curves") drawCharts();
  if (location.hash !== `#${key}`) history.replaceState(null, "", `#${key}`);
}

// What has changed while the run goes on, without losing what someone types or reads.
function showNews(isFollowing) {
  fill(shown.summary, summaryView());
  if (shown.view === "curves") {
    if (charts.size && metricNames().every((name) => knownMetrics.has(name))) drawCharts();
    else showView("curves");
  }
  metricNames().forEach((name) => knownMetrics.add(name));
  if (shown.view === "completions" && !current.view) showView("completions");
  else if (shown.view === "completions" && isFollowing) showCompletions({ keepsGroup: true });
  else if (shown.view === "completions") showStepBar();
}

const knownMetrics = new Set();

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
}

function switchTheme() {
  const isDark = getComputedStyle(document.documentElement).getPropertyValue("--is-dark").trim() === "1";
  setTheme(isDark ? "light" : "dark");
  remember("theme", isDark ? "light" : "dark");
  drawCharts();
}

function pageHead() {
  const tabs = VIEWS.map(([key, label], place) => {
    const tab = h("a", { href: `#${key}`, title: `${label} (${place + 1})`, onclick: (event) => [event.preventDefault(), showView(key)] }, label);
    tab.dataset.view = key;
    return tab;
  });
  fill(shown.tabs, tabs);
  const names = runs.length > 2 ? `${runs.length} runs` : runs.map((run) => run.name).join(" and ");
  return h("header.head", {}, h("h1", { title: runs.map((run) => run.name).join("\n") }, visible(names)), badge, shown.tabs,
    h("div.tools", {}, button("◐", "light, dark (t)", switchTheme), button("?", "keys (?)", () => help.showModal())));
}

async function start() {
  setTheme(remembered("theme", ""));
  openRuns(await readEmbedded("index"));
  metricNames().forEach((name) => knownMetrics.add(name));
  fill(document.getElementById("page"), pageHead(), fill(shown.summary, summaryView()), shown.element, help);
  listenToKeys();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawCharts);
  addEventListener("hashchange", () => showView(location.hash.slice(1)));
  showView(location.hash.slice(1));
  if (isLive) listenToServer();
  performance.mark("ready");
  document.documentElement.dataset.ready = "yes";
}

start().catch((error) => {
  fill(document.getElementById("page"), h("p.empty", {}, `This page cannot be shown: ${error.message}`));
  throw error;
});
