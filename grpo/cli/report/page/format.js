// Numbers as text: four digits, a true minus sign, a dash for an unknown value.

function number(value, digits = 4) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) {
    return value.toExponential(Math.min(2, digits - 1)).replace(/\.?0+e/, "e").replace("e+", "e").replaceAll("-", "−");
  }
  const places = size >= 0.1 ? digits - Math.max(1, Math.floor(Math.log10(size)) + 1) : digits;
  const decimals = Number.isInteger(value) ? 0 : Math.max(0, places);
  return value.toFixed(decimals).replace("-", "−");
}

// A round number at an axis.
function tick(value) {
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? number(value, 3) : String(Number(value.toPrecision(6))).replace("-", "−");
}

// A reward or an advantage: two or three decimals, so that they align.
function decimal(value, decimals = 2) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  return value.toFixed(decimals).replace("-", "−");
}

function signed(value, decimals = 2) {
  const text = decimal(value, decimals);
  return value > 0 ? `+${text}` : text;
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const whole = Math.round(seconds);
  if (whole < 60) return `${seconds < 10 ? seconds.toFixed(1) : whole} s`;
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor((whole % 3600) / 60)];
  return hours ? `${hours} h ${String(minutes).padStart(2, "0")} min` : `${minutes} min ${String(whole % 60).padStart(2, "0")} s`;
}

function bytes(count) {
  if (count === null || count === undefined) return "–";
  return count >= 2 ** 30 ? `${(count / 2 ** 30).toFixed(1)} GiB` : `${Math.round(count / 2 ** 20)} MiB`;
}

function plural(count, word) {
  return `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
}

function mean(values) {
  const known = values.filter((value) => value !== null && value !== undefined);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
}

// The mean of each value and those before it, at most `window` values; null stays null.
function runningMean(values, window) {
  if (window <= 1) return values;
  const kept = [];
  let sum = 0;
  let count = 0;
  return values.map((value) => {
    kept.push(value);
    if (Number.isFinite(value)) [sum, count] = [sum + value, count + 1];
    if (kept.length > window) {
      const old = kept.shift();
      if (Number.isFinite(old)) [sum, count] = [sum - old, count - 1];
    }
    return Number.isFinite(value) ? sum / count : value;
  });
}

// The text of a tool's call, as code: add(a=1, b=2).
function callText(name, values) {
  if (typeof values === "string") {
    try {
      values = JSON.parse(values);
    } catch {
      return `${name}(${values})`;
    }
  }
  if (values === null || typeof values !== "object" || Array.isArray(values)) return `${name}(${JSON.stringify(values) ?? ""})`;
  return `${name}(${Object.entries(values).map(([key, value]) => `${key}=${JSON.stringify(value)}`).join(", ")})`;
}
