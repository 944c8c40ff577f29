// Keys, and the window that lists them.

const KEYS = [
  ["1 2 3", "curves, completions, configuration"],
  ["l", "logarithmic scale of the plots"],
  ["drag, double click", "zoom all plots to these steps, and back"],
  ["[ ]", "previous, next saved step"],
  ["j k", "next, previous prompt"],
  ["c", "colours of the tokens"],
  ["o", "this prompt over all steps"],
  ["/", "search"],
  ["t", "light, dark"],
  ["?", "these keys"],
  ["Esc", "leave the search, close this"],
];

const help = h("dialog.help", { onclick: (event) => event.target === help && help.close() },
  h("h2", {}, "Keys"), h("dl", {}, KEYS.map(([key, text]) => h("div", {}, h("dt", {}, h("kbd", {}, key)), h("dd", {}, text)))),
  h("form", { method: "dialog" }, h("button", {}, "close")));

function stepBy(count) {
  const known = stepsOf(browsing.run);
  const next = known[known.findIndex((one) => one.step === browsing.step) + count];
  if (next) goToStep(next.step);
}

function nextColouring() {
  const names = COLOURINGS.map(([name]) => name);
  browsing.colouring = names[(names.indexOf(browsing.colouring) + 1) % names.length];
  showView("completions");
}

const ACTIONS = {
  1: () => showView("curves"),
  2: () => showView("completions"),
  3: () => showView("configuration"),
  t: () => switchTheme(),
  "?": () => help.showModal(),
  "/": () => document.getElementById("search")?.focus(),
};
const ACTIONS_OF = {
  curves: { l: toggleLog },
  completions: {
    "[": () => stepBy(-1),
    "]": () => stepBy(1),
    j: () => chooseGroup(browsing.group + 1),
    k: () => chooseGroup(browsing.group - 1),
    c: nextColouring,
    o: toggleOverSteps,
  },
};

function listenToKeys() {
  document.addEventListener("keydown", (event) => {
    const isTyping = event.target.matches("input:not([type=range]):not([type=checkbox]), select, textarea");
    if (event.key === "Escape" && isTyping) event.target.blur();
    if (isTyping || event.ctrlKey || event.metaKey || event.altKey || help.open) return;
    const action = ACTIONS_OF[shown.view]?.[event.key] ?? ACTIONS[event.key];
    if (!action || (shown.view === "completions" && !current.view && ACTIONS_OF.completions[event.key])) return;
    event.preventDefault();
    action();
  });
}
