// One prompt over the steps of all runs: how its answers changed.

const MOST_OF_A_STEP = 3; // completions of one step that are shown until asked for all

// Where the page has completions of a prompt: [{run, step}], by step.
function occurrences(key) {
  const found = runs.flatMap((run) => run.steps.filter((step) => step.keys.includes(key)).map((step) => ({ run, step: step.step })));
  return found.sort((a, b) => a.step - b.step || a.run.number - b.run.number);
}

function overSteps(seen) {
  const columns = h("div.columns", {}, seen.map(() => h("section.column")));
  seen.forEach(async ({ run, step }, place) => {
    const part = await completionsOf(run.number, step);
    const column = columns.children[place];
    const key = current.groups[browsing.group]?.group.key;
    const group = part?.groups.find((one) => one.key === key);
    if (group && column.isConnected) showColumn(column, run, group);
  });
  return columns;
}

function showColumn(column, run, group) {
  const best = group.completions
    .map((completion, place) => ({ completion, place }))
    .sort((a, b) => compared(a.completion.reward, b.completion.reward, -1));
  const rewards = group.completions.map((completion) => completion.reward);
  const cards = (count) => best.slice(0, count).map(({ completion, place }) => card(completion, place, browsing.search.toLowerCase()));
  const body = h("div.cards", {}, cards(MOST_OF_A_STEP));
  const rest = best.length - MOST_OF_A_STEP;
  const more = button(`${rest} more`, "all completions of this step", () => {
    fill(body, cards(best.length));
    more.remove();
  });
  more.className = "more";
  fill(column, h("header", {}, runs.length > 1 ? swatch(runColour(run.number)) : null, h("h3", {}, `step ${group.step}`),
    h("span.label", {}, `${runs.length > 1 ? `${visible(run.name)}, ` : ""}mean reward ${decimal(mean(rewards), 3)}`)), body, rest > 0 ? more : null);
}
