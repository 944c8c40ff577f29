// Completions as text: plain, token by token with colours, or as a dialogue.

const COLOURINGS = [
  ["none", "plain"],
  ["logprob", "by log-probability"],
  ["advantage", "by advantage"],
  ["given", "given and sampled"],
];
const MOST_TOKENS = 3000; // shown of one completion before "show all"
const MOST_CHARACTERS = 6000;
const ROLES_OF_TOOLS = new Set(["tool", "function"]);

// The content of a message, which may be a list of parts.
function contentText(content) {
  if (typeof content === "string") return content;
  if (Array.isArray(content)) return content.map((part) => part?.text ?? JSON.stringify(part)).join("");
  return content === null || content === undefined ? "" : JSON.stringify(content);
}

function promptText(prompt) {
  return typeof prompt === "string" ? prompt : prompt.map((message) => contentText(message.content)).join("\n");
}

// What a prompt asks: its last message, or its end.
function promptEnd(prompt) {
  const last = typeof prompt === "string" ? prompt : contentText(prompt[prompt.length - 1].content);
  const text = last.trim().replace(/\s+/g, " ");
  return text.length > 160 ? `…${text.slice(-159)}` : text;
}

// Text of any length in which every occurrence of `search` is marked.
function marked(text, search) {
  const shown = visible(text);
  if (!search) return [shown];
  const parts = [];
  const lower = shown.toLowerCase();
  let from = 0;
  for (let at = lower.indexOf(search); at >= 0 && parts.length < 2000; at = lower.indexOf(search, from)) {
    parts.push(shown.slice(from, at), h("mark", {}, shown.slice(at, at + search.length)));
    from = at + search.length;
  }
  return [...parts, shown.slice(from)];
}

function plainText(text, search) {
  const element = h("div.text", { dir: "auto" });
  const rest = text.length - MOST_CHARACTERS;
  if (rest <= 0) return fill(element, marked(text, search));
  fill(element, marked(text.slice(0, MOST_CHARACTERS), search));
  const all = button(`show ${rest.toLocaleString("en")} more characters`, "", () => {
    fill(element, marked(text, search));
    all.remove();
  });
  all.classList.add("more");
  return h("div", {}, element, all);
}

function tokenClass(token, colouring, advantage) {
  if (token.isGiven) return "t given";
  const kind = token.isSpecial ? "t special" : "t";
  if (colouring === "logprob" && token.logprob !== null) return `${kind} p${Math.min(9, Math.floor(-token.logprob * 2))}`;
  if (colouring === "advantage" && advantage) return `${kind} ${advantage > 0 ? "up" : "down"}`;
  return kind;
}

function tokenTitle(token, advantage) {
  const text = JSON.stringify(visible(token.text));
  if (token.isGiven) return `${text}\ngiven, not sampled`;
  const likely = token.logprob === null ? "" : `\nlog p ≈ ${decimal(token.logprob)}   p ≈ ${number(Math.exp(token.logprob), 2)}`;
  return `${text}${likely}${advantage === null ? "" : `\nadvantage ${signed(advantage)}`}`;
}

function tokenText(completion, colouring) {
  const { tokens, advantage } = completion;
  const element = h("div.text.tokens", {
    dir: "auto",
    onmouseover: (event) => {
      const place = event.target.dataset?.place;
      if (place !== undefined && !event.target.title) event.target.title = tokenTitle(tokens[place], advantage);
    },
  });
  const strength = Math.min(1, Math.abs(advantage ?? 0) / 2);
  element.style.setProperty("--strength", `${Math.round(14 + 46 * strength)}%`);
  const add = (from, to) => element.append(...tokens.slice(from, to).map((token, n) => {
    const span = h("span", { className: tokenClass(token, colouring, advantage) }, visible(token.text).replaceAll("\n", "↵\n"));
    span.dataset.place = from + n;
    return span;
  }));
  add(0, MOST_TOKENS);
  if (tokens.length <= MOST_TOKENS) return element;
  const all = button(`show ${(tokens.length - MOST_TOKENS).toLocaleString("en")} more tokens`, "", () => {
    add(MOST_TOKENS, tokens.length);
    all.remove();
  });
  all.classList.add("more");
  return h("div", {}, element, all);
}

// The messages of a prompt or an episode; `calls`: records of the tools' calls in their order.
function dialogue(messages, calls, search) {
  let answered = 0;
  const rows = messages.map((message) => {
    const isTool = ROLES_OF_TOOLS.has(message.role);
    const record = isTool ? calls?.[answered++] : null;
    const made = (message.tool_calls ?? []).map((call) => {
      const { name, arguments: values } = call.function ?? call;
      return h("code.call", { dir: "auto" }, marked(callText(name ?? "?", values), search));
    });
    const text = contentText(message.content);
    const label = isTool ? message.name ?? record?.name ?? "tool" : message.role;
    const note = record?.error ? h("span.error", {}, ` ${record.error}`) : null;
    return h(`div.message.${isTool ? "of-tool" : message.role === "assistant" ? "of-model" : "of-user"}`, {},
      h("span.role", {}, visible(label), note),
      h("div.content", {}, message.reasoning_content ? h("div.reasoning", {}, plainText(message.reasoning_content, search)) : null,
        text || !made.length ? plainText(text, search) : null, made));
  });
  return h("div.dialogue", {}, rows);
}

function completionText(completion, colouring, search) {
  if (colouring !== "none" && completion.tokens) return tokenText(completion, colouring);
  if (completion.messages) return dialogue(completion.messages, completion.calls, search);
  return plainText(completion.text, search);
}

function promptView(group, search) {
  const { prompt, prefix } = group;
  const body = typeof prompt === "string" ? plainText(prompt, search) : dialogue(prompt, null, search);
  const data = Object.entries(group.data).filter(([, value]) => value !== null);
  return h("div.prompt", {}, clipped(body, 240, "end"), prefix ? h("div.prefix", {}, h("span.role", {}, "begins with"), plainText(prefix, search)) : null,
    data.length ? h("dl.data", {}, data.map(([name, value]) => h("div", {}, h("dt", {}, visible(name)), h("dd", { dir: "auto" }, visible(shortened(value, 300)))))) : null);
}

function shortened(value, most) {
  const text = String(value);
  return text.length > most ? `${text.slice(0, most)}… (${text.length.toLocaleString("en")} characters)` : text;
}

// An element that is at most so many pixels high until its button is pressed. `part`: "start" or "end", what is shown of it.
function clipped(body, pixels, part = "start") {
  const inner = h("div.clip", {}, body);
  inner.style.maxHeight = `${pixels}px`;
  const more = button("show all", "", () => {
    inner.style.maxHeight = "none";
    inner.classList.remove("clipped-start", "clipped-end");
    more.remove();
  });
  more.className = "more";
  more.hidden = true;
  requestAnimationFrame(() => {
    const isShort = inner.scrollHeight <= pixels + 24;
    if (isShort) inner.style.maxHeight = "none";
    else inner.classList.add(`clipped-${part}`);
    if (part === "end") inner.scrollTop = inner.scrollHeight;
    more.hidden = isShort;
  });
  return h("div", {}, inner, more);
}
