// Which completions are shown, and in which order.

const browsing = { run: 0, step: null, group: 0, colouring: "none", sort: "sampled", below: "", finish: "", search: "", isEverywhere: false, isOverSteps: false };

const likelihood = (completion) => {
  const known = (completion.tokens ?? []).map((token) => token.logprob).filter((value) => value !== null);
  return known.length ? mean(known) : null;
};
const SORTS = {
  sampled: ["as sampled", null, 0],
  "reward-down": ["reward, high first", (completion) => completion.reward, -1],
  "reward-up": ["reward, low first", (completion) => completion.reward, 1],
  "length-down": ["length, long first", (completion) => completion.length, -1],
  "length-up": ["length, short first", (completion) => completion.length, 1],
  likely: ["likelihood, high first", likelihood, -1],
  unlikely: ["likelihood, low first", likelihood, 1],
};
const ENDS = [
  ["", "any end"],
  ["truncated", "cut off"],
  ["stop", "stop"],
  ["length", "length"],
  ["turns", "turns"],
  ["done", "done"],
  ["abort", "abort"],
  ["failed", "failed (void)"],
];
const isTruncated = (finish) => finish === "length" || finish === "turns";

function isFiltered() {
  return browsing.below !== "" || browsing.finish !== "" || browsing.search !== "";
}

function matchesEnd(completion) {
  const { finish } = browsing;
  return finish === "" || completion.finish === finish || (finish === "truncated" && isTruncated(completion.finish));
}

function matchesReward(completion) {
  return browsing.below === "" || (completion.reward !== null && completion.reward < Number(browsing.below));
}

function messageText(message) {
  const calls = (message.tool_calls ?? []).map((call) => callText(call.function?.name ?? call.name ?? "", call.function?.arguments ?? call.arguments));
  return [contentText(message.content), ...calls].join("\n");
}

function hasText(completion, search) {
  if (completion.text.toLowerCase().includes(search)) return true;
  return (completion.messages ?? []).some((message) => messageText(message).toLowerCase().includes(search));
}

// The completions of a group that pass the filters, sorted, with their places in the group.
function chosen(group) {
  const search = browsing.search.toLowerCase();
  const isAsked = search !== "" && promptText(group.prompt).toLowerCase().includes(search);
  const found = group.completions
    .map((completion, place) => ({ completion, place }))
    .filter(({ completion: one }) => matchesEnd(one) && matchesReward(one) && (search === "" || isAsked || hasText(one, search)));
  const [, key, direction] = SORTS[browsing.sort];
  return key ? found.sort((a, b) => compared(key(a.completion), key(b.completion), direction)) : found;
}

// Unknown values come last.
function compared(a, b, direction) {
  if (a === null || b === null) return (a === null) - (b === null);
  return direction * (a - b);
}

// Groups with a completion that passes the filters, in the order of the mean of what completions are sorted by.
function chosenGroups(groups) {
  const found = groups.map((group) => ({ group, found: chosen(group) })).filter((one) => one.found.length);
  const [, key, direction] = SORTS[browsing.sort];
  const value = ({ group }) => mean(group.completions.map(key));
  return key ? found.map((one) => [value(one), one]).sort(([a], [b]) => compared(a, b, direction)).map(([, one]) => one) : found;
}

function filterBar(onchange) {
  const set = (name) => (value) => {
    browsing[name] = value;
    onchange();
  };
  const later = debounced(150, onchange);
  const typed = (name) => (event) => {
    browsing[name] = event.target.value;
    later();
  };
  const everywhere = h("input", { type: "checkbox", id: "everywhere", checked: browsing.isEverywhere, onchange: () => set("isEverywhere")(everywhere.checked) });
  return h("div.toolbar.filters", {},
    h("input", { type: "search", id: "search", placeholder: "search prompts and completions", "aria-label": "search", value: browsing.search, oninput: typed("search") }),
    labelled("reward below", h("input", { type: "number", step: "any", id: "below", value: browsing.below, oninput: typed("below") })),
    select("how it ended", ENDS, browsing.finish, set("finish")),
    select("order", Object.entries(SORTS).map(([key, [text]]) => [key, text]), browsing.sort, set("sort")),
    h("label.field", { title: "look at every step of the run that this page has" }, everywhere, h("span", {}, "all steps")),
    h("span.space"),
    labelled("colours", select("colours of tokens (c)", COLOURINGS, browsing.colouring, set("colouring"))));
}
