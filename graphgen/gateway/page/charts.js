// The three charts. Each is given plain arrays and draws them; what they mean is main.js's.

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function make(id, options, data) {
  const place = document.getElementById(id);
  const size = () => ({ width: place.clientWidth, height: place.clientHeight });
  const axis = { stroke: colour("soft"), grid: { stroke: colour("line"), width: 1 }, ticks: { show: false }, font: "11px system-ui" };
  const chart = new uPlot(
    {
      ...size(),
      legend: { show: false },
      cursor: { show: false },
      ...options,
      axes: options.axes.map((own) => ({ ...axis, ...own })),
    },
    data,
    place,
  );
  new ResizeObserver(() => chart.setSize(size())).observe(place);
  return chart;
}

const bars = uPlot.paths.bars({ size: [0.9, 60], gap: 0 });
const filled = (name, more = {}) => ({ fill: colour(name), stroke: colour(name), width: 0, points: { show: false }, ...more });

// Stacked by drawing the sums, the largest first.
export function stepChart(most) {
  const chart = make(
    "steps",
    {
      padding: [10, 0, 0, 0],
      scales: {
        x: { time: false, range: [-most + 0.5, 0.5] },
        y: { range: (_, low, high) => [0, Math.max(8, high * 1.1)] },
        ms: { range: (_, low, high) => [0, Math.max(5, high * 1.25)] },
      },
      series: [
        {},
        filled("padding", { paths: bars }),
        filled("chunk", { paths: bars }),
        filled("decode", { paths: bars }),
        { scale: "ms", stroke: colour("time"), width: 1.5, points: { show: false } },
      ],
      axes: [
        { size: 24, values: (_, ticks) => ticks.map((tick) => (tick === 0 ? "now" : `${-tick} ago`)) },
        { label: "rows", labelSize: 14, size: 44, labelFont: "11px system-ui" },
        { scale: "ms", side: 1, grid: { show: false }, label: "ms", labelSize: 14, size: 44, labelFont: "11px system-ui" },
      ],
    },
    [[], [], [], [], []],
  );
  return ({ decodes, chunks, paddings, ms }) => {
    const first = 1 - decodes.length;
    chart.setData([
      decodes.map((_, index) => first + index),
      decodes.map((count, index) => count + chunks[index] + paddings[index]),
      decodes.map((count, index) => count + chunks[index]),
      decodes,
      ms,
    ]);
  };
}

// One bar for each range, whatever its width; a line where the target lies.
export function gapChart() {
  let bounds = [];
  let target = null;
  const place = (ms) => {
    const index = bounds.findIndex((bound) => ms <= bound);
    if (index < 0) return bounds.length;
    const low = index ? bounds[index - 1] : 0;
    return index - 0.5 + (ms - low) / (bounds[index] - low);
  };
  const line = (chart) => {
    if (target === null) return;
    const x = chart.valToPos(place(target), "x", true);
    const { ctx, bbox } = chart;
    if (x < bbox.left || x > bbox.left + bbox.width) return;
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = colour("warn");
    ctx.lineWidth = 2;
    ctx.setLineDash([6, 4]);
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
    ctx.font = `${11 * devicePixelRatio}px system-ui`;
    ctx.textAlign = x > bbox.left + bbox.width * 0.7 ? "right" : "left";
    ctx.fillText(` target ${target} ms `, x, bbox.top + 11 * devicePixelRatio);
    ctx.restore();
  };
  const chart = make(
    "gaps",
    {
      padding: [14, 8, 0, 0],
      scales: { x: { time: false, range: (_, low, high) => [low - 0.6, high + 0.6] }, y: { range: (_, low, high) => [0, Math.max(4, high * 1.1)] } },
      series: [{}, filled("decode", { paths: bars })],
      axes: [
        { size: 24, grid: { show: false }, splits: (own) => own.data[0], space: 10, values: (_, ticks) => ticks.map((tick, index) => (ticks.length < 16 || index % 2 === 0 ? (bounds[tick] ?? "more") : "")) },
        { size: 44 },
      ],
      hooks: { draw: [line] },
    },
    [[], []],
  );
  // counts: of each range, and of what is above the last. Ranges that hold nothing, or hardly anything and are short, are
  // left out at the ends.
  return (boundsMs, counts, targetMs) => {
    bounds = boundsMs;
    target = targetMs;
    const few = counts.reduce((sum, count) => sum + count, 0) / 200;
    let seen = 0;
    const used = counts.map((count, index) => (count && (seen += count) > few ? index : -1)).filter((index) => index >= 0);
    if (target !== null) used.push(Math.min(Math.ceil(place(target)), bounds.length));
    const low = used.length ? Math.max(0, Math.min(...used) - 1) : 0;
    const high = used.length ? Math.min(bounds.length, Math.max(...used) + 1) : 9;
    const shown = counts.map((_, index) => index).slice(low, high + 1);
    chart.setData([shown, shown.map((index) => counts[index])]);
  };
}

export function cacheChart(seconds) {
  const area = uPlot.paths.stepped({ align: 1 });
  const chart = make(
    "cache",
    {
      padding: [10, 20, 0, 0],
      scales: { x: { time: false, range: [-seconds, 0] }, y: { range: (_, low, high) => [0, high || 1] } },
      series: [{}, filled("padding", { paths: area }), filled("cached", { paths: area }), filled("chunk", { paths: area })],
      axes: [{ size: 24, values: (_, ticks) => ticks.map((tick) => (tick === 0 ? "now" : `${-tick} s ago`)) }, { size: 54 }],
    },
    [[], [], [], []],
  );
  return (times, used, cached, total) =>
    chart.setData([times, total, used.map((count, index) => count + cached[index]), used]);
}
