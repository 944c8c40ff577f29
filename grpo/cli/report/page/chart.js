// One plot: a title, the values at the cursor, and uPlot. All plots share the cursor, the zoom and the smoothing.

const DASHES = [undefined, [6, 4], [2, 3], [8, 3, 2, 3]];
const charts = new Set();
const plotting = { zoom: null, smoothing: null, isLog: false }; // zoom: steps [first, last]; smoothing: steps, null: automatic

function fullRange() {
  let [first, last] = [Infinity, -Infinity];
  for (const run of shownRuns()) {
    for (const [steps] of run.metrics.values()) {
      if (steps.length) [first, last] = [Math.min(first, steps[0]), Math.max(last, steps[steps.length - 1])];
    }
  }
  return first < last ? [first, last] : Number.isFinite(first) ? [first - 1, first + 1] : [0, 1];
}

function windowSize() {
  const [first, last] = fullRange();
  return plotting.smoothing ?? Math.max(1, Math.floor((last - first) / 10));
}

function zoomTo(range) {
  plotting.zoom = range;
  const [min, max] = range ?? fullRange();
  for (const chart of charts) chart.plot?.setScale("x", { min, max });
  onZoom();
}

let onZoom = () => {};

// The lines of a chart: one for each of its metrics and each run that has it.
function linesOf(spec) {
  const several = shownRuns().length > 1;
  return shownRuns().flatMap((run) =>
    spec.lines.flatMap((line, place) => {
      const [steps, values] = run.metrics.get(line.metric) ?? [[], []];
      if (!values.some(Number.isFinite)) return [];
      const colour = several ? runColour(run.number) : line.colour ?? RUN_COLOURS[place % RUN_COLOURS.length];
      const label = several ? (spec.lines.length > 1 ? `${run.name} ${line.label}` : run.name) : line.label;
      const dash = several && !line.isPoints ? DASHES[spec.lines.filter((one) => !one.isPoints).indexOf(line) % DASHES.length] : undefined;
      return [{ ...line, run, label, colour, dash, steps, values }];
    }),
  );
}

// All lines over the union of their steps. A step that a line does not have is undefined, which is no gap; null is one.
function aligned(columns) {
  const steps = [...new Set(columns.flatMap(([steps]) => steps))].sort((a, b) => a - b);
  const places = new Map(steps.map((step, place) => [step, place]));
  return [steps, ...columns.map(([of, values]) => {
    const column = new Array(steps.length).fill(undefined);
    of.forEach((step, place) => (column[places.get(step)] = values[place]));
    return column;
  })];
}

class Chart {
  // spec: {title, lines: [{metric, label, isPoints, colour, band}], isStacked, isShare, isWide}; band: the metrics of the interval
  constructor(spec) {
    this.spec = spec;
    this.isLog = plotting.isLog;
    this.title = h("span.title", { title: spec.lines.map((line) => line.metric).join("\n") }, spec.title);
    this.at = h("span.at");
    this.legend = h("span.legend");
    this.logButton = button("log", "logarithmic scale of this plot", () => this.setLog(!this.isLog), this.isLog);
    this.logButton.classList.add("quiet");
    this.area = h("div.area");
    this.element = h(spec.isWide ? "figure.chart.wide" : "figure.chart", {},
      h("figcaption", {}, this.title, spec.isStacked ? null : this.logButton, this.at, h("span.space"), this.legend), this.area);
    charts.add(this);
  }

  setLog(isLog) {
    this.isLog = isLog;
    this.logButton.setAttribute("aria-pressed", String(isLog));
    this.draw();
  }

  // Makes the plot again, of the current data.
  draw() {
    this.lines = linesOf(this.spec);
    this.element.hidden = this.lines.length === 0;
    this.plot?.destroy();
    this.plot = null;
    if (this.element.hidden || !this.area.clientWidth) return;
    const isStacked = this.spec.isStacked && shownRuns().length === 1;
    const { data, series, bands } = isStacked ? this.stacked() : this.separate();
    this.data = data;
    this.items = this.lines.map((line) => {
      const value = h("b");
      return { value, element: h("span.item", {}, line.label ? swatch(line.colour, line.isPoints ? "point" : "line") : null, h("span.name", {}, visible(line.label)), value) };
    });
    fill(this.legend, this.items.map((item) => item.element));
    this.plot = new uPlot(this.options(series, bands), data, this.area);
    this.showValues(null);
  }

  separate() {
    const window = windowSize();
    const columns = [];
    const series = [{}];
    const bands = [];
    for (const line of this.lines) {
      const values = this.isLog ? line.values.map((value) => (value > 0 ? value : null)) : line.values;
      const stroke = colourOf(line.colour);
      line.raw = columns.push([line.steps, values]);
      if (line.isPoints) {
        series.push({ stroke, width: 1.5, dash: [3, 4], points: { show: true, size: 8, width: 2, stroke, fill: colourOf("--panel") } });
        const bounds = (line.band ?? []).map((metric) => line.run.metrics.get(metric)).filter(Boolean);
        if (bounds.length === 2) {
          const [low, high] = bounds.map(([steps, ends]) => columns.push([steps, this.isLog ? ends.map((end) => (end > 0 ? end : null)) : ends]));
          series.push(...[low, high].map(() => ({ stroke: "transparent", width: 0, points: { show: false } })));
          bands.push({ series: [high, low], fill: `${stroke}26` });
        }
        continue;
      }
      const isSmooth = window > 1 && line.steps.length > 2;
      series.push({ stroke, width: isSmooth ? 1 : 1.75, alpha: isSmooth ? 0.32 : 1, dash: isSmooth ? undefined : line.dash, points: { show: line.steps.length < 3 } });
      if (isSmooth) {
        line.smooth = columns.push([line.steps, runningMean(values, window)]);
        series.push({ stroke, width: 2, dash: line.dash, points: { show: false } });
      }
    }
    return { data: aligned(columns), series: series.map((one) => ({ spanGaps: false, ...one })), bands };
  }

  // Each line on top of those before it, with the area between them filled.
  stacked() {
    const [steps, ...columns] = aligned(this.lines.map((line) => [line.steps, line.values]));
    const sums = steps.map(() => 0);
    const stack = columns.map((column) => column.map((value, place) => (sums[place] += value ?? 0)));
    const series = [{}, ...this.lines.map((line) => ({ stroke: colourOf(line.colour), width: 1, points: { show: false } }))];
    const fillOf = (place) => `${colourOf(this.lines[place].colour)}59`;
    series[1].fill = fillOf(0);
    const bands = stack.slice(1).map((_, place) => ({ series: [place + 2, place + 1], fill: fillOf(place + 1) }));
    this.lines.forEach((line, place) => (line.raw = place + 1));
    this.columns = columns;
    return { data: [steps, ...stack], series, bands };
  }

  options(series, bands) {
    const ink = () => colourOf("--faint");
    const line = { stroke: () => colourOf("--line"), width: 1 };
    const axis = { stroke: ink, grid: line, ticks: { show: false }, font: "11px system-ui, sans-serif" };
    const range = this.isLog ? (u, min, max) => uPlot.rangeLog(min, max, 10, true) : (u, min, max) => this.valueRange(min, max);
    return {
      width: this.area.clientWidth,
      height: this.spec.isWide ? 260 : 170,
      legend: { show: false },
      series,
      bands,
      padding: [10, 10, 0, 0],
      scales: { x: { time: false, range: () => plotting.zoom ?? fullRange() }, y: { distr: this.isLog ? 3 : 1, range } },
      axes: [
        { ...axis, grid: { show: false }, size: 26, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 1e4, 5e4, 1e5, 1e6] },
        { ...axis, size: 54, values: (u, ticks) => ticks.map((value) => (value === null ? "" : tick(value))) },
      ],
      cursor: {
        y: false,
        points: { size: 7 },
        drag: { x: true, y: false, setScale: false },
        sync: { key: "steps", scales: ["x", null], filters: { pub: (type) => type === "mousemove" || type === "mouseleave" } },
        bind: { dblclick: () => () => zoomTo(null) },
      },
      hooks: {
        setCursor: [(plot) => this.showValues(plot.cursor.idx)],
        setSelect: [(plot) => this.select(plot)],
        drawAxes: [(plot) => this.drawEvents(plot)],
      },
    };
  }

  valueRange(min, max) {
    if (min === null || max === null) return [0, 1];
    if (this.spec.isShare && min >= 0 && max <= 1) return [-0.02, 1.02];
    if (this.spec.isStacked) return [0, max * 1.05 || 1];
    if (min === max) return min === 0 ? [-1, 1] : [min - Math.abs(min) * 0.1, max + Math.abs(max) * 0.1];
    return [min - (max - min) * 0.06, max + (max - min) * 0.08];
  }

  select(plot) {
    if (plot.select.width < 4) return;
    const range = [plot.posToVal(plot.select.left, "x"), plot.posToVal(plot.select.left + plot.select.width, "x")];
    plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    if (range[1] - range[0] > 1e-9) zoomTo(range);
  }

  // The values at a place of the data, or the last ones.
  showValues(place) {
    if (!this.data) return;
    const steps = this.data[0];
    this.at.textContent = place === null || place === undefined ? "" : `step ${steps[place]}`;
    this.lines.forEach((line, n) => {
      const column = this.spec.isStacked && this.columns ? this.columns[n] : this.data[line.raw];
      let at = place ?? steps.length - 1;
      while (at >= 0 && !Number.isFinite(column[at]) && (place === null || place === undefined || line.isPoints)) at -= 1;
      this.items[n].value.textContent = number(column[at]);
    });
  }

  drawEvents(plot) {
    const { ctx, bbox } = plot;
    for (const run of shownRuns()) {
      for (const event of guardEvents(run)) {
        const x = plot.valToPos(event.step, "x", true);
        if (x < bbox.left || x > bbox.left + bbox.width) continue;
        ctx.save();
        ctx.strokeStyle = ctx.fillStyle = colourOf(event.colour);
        ctx.globalAlpha = 0.7;
        ctx.lineWidth = devicePixelRatio;
        ctx.setLineDash([3 * devicePixelRatio, 3 * devicePixelRatio]);
        ctx.beginPath();
        ctx.moveTo(x, bbox.top);
        ctx.lineTo(x, bbox.top + bbox.height);
        ctx.stroke();
        const size = 4 * devicePixelRatio;
        ctx.beginPath();
        ctx.moveTo(x - size, bbox.top - size);
        ctx.lineTo(x + size, bbox.top - size);
        ctx.lineTo(x, bbox.top + size / 2);
        ctx.fill();
        ctx.restore();
      }
    }
  }

  resize() {
    if (!this.area.clientWidth || this.element.hidden) return;
    if (this.plot) this.plot.setSize({ width: this.area.clientWidth, height: this.plot.height });
    else this.draw();
  }

  remove() {
    charts.delete(this);
    this.plot?.destroy();
  }
}
