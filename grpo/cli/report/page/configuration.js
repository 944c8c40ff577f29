// All options of the runs, and where they differ.

function configurationView() {
  const several = runs.length > 1;
  const kinds = [["all", "all options"], ["changed", "changed from the defaults"], ...(several ? [["differing", "differing between runs"]] : [])];
  const state = { kind: several ? "differing" : "changed", search: "" };
  const body = h("tbody");
  const note = h("p.empty");
  const options = runs.map((run) => new Map(run.options.map(([key, text, isChanged]) => [key, { text, isChanged }])));
  const keys = [...new Set(runs.flatMap((run) => run.options.map(([key]) => key)))];
  const show = () => {
    const rows = keys.map((key) => [key, options.map((of) => of.get(key))]).filter(([key, values]) => isShownOption(key, values, state));
    fill(body, rows.map(([key, values]) => optionRow(key, values)));
    note.hidden = rows.length > 0;
    note.textContent = state.kind === "differing" && !state.search ? "The configurations are the same." : "No such option.";
  };
  const search = h("input", { type: "search", id: "search", placeholder: "search options", "aria-label": "search options", oninput: () => [(state.search = search.value.toLowerCase()), show()] });
  const kind = select("options", kinds, state.kind, (value) => [(state.kind = value), show()]);
  const head = several ? h("thead", {}, h("tr", {}, h("th", {}), runs.map((run) => h("th", {}, swatch(runColour(run.number)), visible(run.name))))) : null;
  show();
  return h("section.view.configuration", {}, h("div.toolbar", {}, search, kind), h("div.scroll", {}, h("table.options", {}, head, body)), note);
}

function isShownOption(key, values, { kind, search }) {
  if (kind === "changed" && !values.some((value) => value?.isChanged)) return false;
  if (kind === "differing" && new Set(values.map((value) => value?.text)).size < 2) return false;
  return !search || [key, ...values.map((value) => value?.text ?? "")].some((text) => text.toLowerCase().includes(search));
}

function optionRow(key, values) {
  const [, section, name] = /^(.*\.)?([^.]*)$/.exec(key);
  const isDiffering = new Set(values.map((value) => value?.text)).size > 1;
  return h(isDiffering ? "tr.differs" : "tr", {}, h("th", { scope: "row" }, h("span.label", {}, section ?? ""), name),
    values.map((value) => h(value?.isChanged ? "td.changed" : "td", { dir: "auto" }, value ? visible(shortened(value.text, 2000)) : "–")));
}
