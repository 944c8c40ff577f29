// The data of the page: gzip in base64, in script elements that are no scripts, or fetched from the server of `--serve`.

const FIRST_CHARACTER = 35;
const isLive = document.getElementById("index").dataset.live === "yes";
const loadedParts = new Map(); // by `run-step`; the most recently used last
const MOST_PARTS = 400;

async function readJson(compressed) {
  const stream = new Blob([compressed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text()); // bytes that are no UTF-8 become U+FFFD
}

function fromBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text.trim());
  return Uint8Array.from(atob(text.trim()), (character) => character.charCodeAt(0));
}

async function readEmbedded(id) {
  const element = document.getElementById(id);
  return element ? readJson(fromBase64(element.textContent)) : null;
}

async function readPart(run, step) {
  const embedded = await readEmbedded(`part-${run}-${step}`);
  if (embedded || !isLive) return embedded;
  const answer = await fetch(`part/${run}/${step}`);
  return answer.ok ? readJson(await answer.arrayBuffer()) : null;
}

// The completions of a step, or null where the page has none.
async function completionsOf(run, step) {
  const key = `${run}-${step}`;
  let part = loadedParts.get(key);
  if (!part) {
    const raw = await readPart(run, step);
    if (!raw) return null;
    part = unpacked(raw, run, step);
  }
  loadedParts.delete(key);
  loadedParts.set(key, part);
  if (loadedParts.size > MOST_PARTS) loadedParts.delete(loadedParts.keys().next().value);
  return part;
}

// Groups with their completions as objects: what `pack_step` wrote as columns.
function unpacked(raw, run, step) {
  const special = new Set(raw.special ?? []);
  let row = 0;
  const groups = raw.groups.map((group, number) => {
    const completions = Array.from({ length: group.rows }, () => completionAt(raw, row++, special));
    return { ...group, run, step, number, completions };
  });
  return { groups, of: raw.of };
}

function completionAt(raw, row, special) {
  const columns = (values) => Object.fromEntries(Object.entries(values).map(([name, column]) => [name, column[row]]));
  const tokens = raw.ids ? tokensAt(raw, row, special) : null;
  const spelled = raw.text[row] ?? tokens.filter((token) => !token.isSpecial).map((token) => token.text).join("");
  return {
    reward: raw.reward[row],
    advantage: raw.advantage[row],
    finish: raw.finish[row],
    length: raw.tokens[row],
    given: raw.given?.[row] ?? 0,
    rewards: columns(raw.rewards),
    extras: columns(raw.extras),
    text: spelled,
    messages: raw.messages?.[row] ?? null,
    calls: raw.calls?.[row] ?? null,
    failure: raw.failure?.[row] ?? null,
    tokens,
  };
}

// Tokens with text, log-probability (null: not known) and whether they were given.
function tokensAt(raw, row, special) {
  const marks = raw.logprobs?.[row] ?? "";
  return Array.from(raw.ids[row], (character, place) => {
    const code = character.codePointAt(0);
    const index = (code < 0xd800 ? code : code - 0x800) - FIRST_CHARACTER;
    const level = marks.charCodeAt(place) - FIRST_CHARACTER;
    return {
      text: raw.vocabulary[index],
      isSpecial: special.has(index),
      isGiven: marks[place] === " ",
      logprob: level >= 0 ? -((level / 20) ** 2) : null,
    };
  });
}
