"use strict";
// Paints the figures in the colours of the page's theme, now and whenever the theme changes.
const figures = JSON.parse(document.getElementById("figures").textContent);
const style = getComputedStyle(document.body);
const shade = (name) => style.getPropertyValue(name).trim();
const ARMS = 6;

function painted(trace) {
  const { arm, part } = trace.meta;
  const colour = arm === null ? shade(part === "margin" ? "--bad" : part === "start" ? "--soft" : "--ink")
    : shade(`--arm-${arm % ARMS}`);
  const copy = structuredClone(trace);
  if (part === "band") copy.fillcolor = colour + "26";
  if (copy.line) copy.line.color = part === "band" ? "rgba(0,0,0,0)" : colour;
  if (copy.marker) copy.marker = { ...copy.marker, color: colour, line: { ...copy.marker.line, color: colour } };
  if (copy.error_x) copy.error_x.color = colour;
  return copy;
}

function layout(figure) {
  const axis = (own) => ({ gridcolor: shade("--grid"), linecolor: shade("--line"), zerolinecolor: shade("--line"),
    fixedrange: true, ...own });
  const shapes = (figure.layout.shapes || []).map((s) => ({ ...s, line: { ...s.line, color: shade("--soft") } }));
  return { ...figure.layout, shapes, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: false,
    font: { family: style.fontFamily || "sans-serif", size: 12, color: shade("--ink") },
    hoverlabel: { bgcolor: shade("--card"), bordercolor: shade("--line"), font: { color: shade("--ink") } },
    xaxis: axis(figure.layout.xaxis), yaxis: axis(figure.layout.yaxis) };
}

function paint() {
  for (const figure of figures) {
    Plotly.react(figure.id, figure.data.map(painted), layout(figure), { displayModeBar: false });
  }
}

paint();
// Plotly's own `responsive` hears the window alone; a figure can change its width without it.
const watch = new ResizeObserver((seen) => seen.forEach((entry) => Plotly.Plots.resize(entry.target)));
figures.forEach((figure) => watch.observe(document.getElementById(figure.id)));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
