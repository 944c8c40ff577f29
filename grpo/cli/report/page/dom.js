// Elements. Whatever a model wrote enters the page only here, as the content of a text node.

// h("p.note", {title: "..."}, "text", child): properties are set, functions listen (`onclick`), others become attributes.
function h(selector, properties = {}, ...children) {
  const [tag, ...classes] = selector.split(".");
  const element = document.createElement(tag || "div");
  if (classes.length) element.className = classes.join(" ");
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (name in element && name !== "list") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

function fill(element, ...children) {
  element.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

// Control characters other than tab and newline, and separators that end lines, as symbols.
function visible(text) {
  return String(text)
    .replace(/[\u0000-\u0008\u000b-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
    .replace(/\u007f/g, "\u2421")
    .replace(/[\u2028\u2029]/g, "\u21b5\n");
}

function select(label, options, value, onchange) {
  const element = h(
    "select",
    { "aria-label": label, title: label, onchange: () => onchange(element.value) },
    options.map(([key, text]) => h("option", { value: key }, text)),
  );
  element.value = value;
  return element;
}

function labelled(text, element) {
  return h("label.field", {}, h("span", {}, text), element);
}

function button(text, title, onclick, pressed) {
  const properties = { type: "button", title, onclick };
  if (pressed !== undefined) properties["aria-pressed"] = String(pressed);
  return h("button", properties, text);
}

// Calls a function once the calls have stopped for a moment.
function debounced(milliseconds, action) {
  let timer;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => action(...values), milliseconds);
  };
}

function remembered(key, fallback) {
  try {
    return localStorage.getItem(`rankup.${key}`) ?? fallback;
  } catch {
    return fallback; // a page from disk may have no storage
  }
}

function remember(key, value) {
  try {
    localStorage.setItem(`rankup.${key}`, value);
  } catch {
    // the choice is then forgotten with the page
  }
}
