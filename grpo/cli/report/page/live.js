// `--serve`: asks the server now and then what is new. Nothing of this runs in a page from disk.

const ASK_AGAIN = 2000; // milliseconds
const SLOWEST = 30000;
const badge = h("span.badge", { hidden: true });

function listenToServer() {
  badge.hidden = false;
  let wait = ASK_AGAIN;
  let seen = runs.map((run) => run.seen);
  const ask = async () => {
    try {
      const answer = await fetch(`new?seen=${encodeURIComponent(seen.join(","))}`, { cache: "no-store" });
      if (!answer.ok) throw new Error(answer.statusText);
      const news = await answer.json();
      if (news.restart) return location.reload();
      seen = news.runs.map((run) => run.seen);
      takeNews(news.runs);
      wait = ASK_AGAIN;
    } catch {
      wait = Math.min(SLOWEST, wait * 2);
      badge.textContent = "the server does not answer";
      badge.className = "badge lost";
    }
    return setTimeout(ask, wait);
  };
  showBadge();
  setTimeout(ask, wait);
}

function takeNews(news) {
  let isChanged = false;
  const wasLast = runs.map((run) => run.steps.at(-1)?.step === browsing.step);
  news.forEach((one, number) => {
    if (!one.metrics) return;
    isChanged = true;
    const run = runs[number];
    appendMetrics(run, one.metrics);
    Object.assign(run, { headline: one.headline, facts: one.facts, steps: one.steps });
  });
  showBadge();
  if (!isChanged) return;
  if (wasLast[browsing.run]) browsing.step = runs[browsing.run].steps.at(-1)?.step ?? null; // follow the run
  showNews(wasLast[browsing.run]);
}

function showBadge() {
  const going = runs.filter((run) => run.headline.state === "not finished");
  badge.className = going.length ? "badge live" : "badge";
  badge.textContent = going.length ? `live, step ${Math.max(...going.map((run) => run.headline.steps))}` : "complete";
}
