"use strict";
// Paints the figures in the colours of the page's theme, now and whenever the theme changes.
const figures = JSON.parse(document.getElementById("figures").textContent);
const style = getComputedStyle(document.body);
const shade = (name) => style.getPropertyValue(name).trim();
const ARMS = 6;
const OF_NO_ARM = { margin: "--bad", start: "--soft" };

function painted(trace) {
  if (!trace.meta) return trace; // a heat map has a scale of its own
  const { arm, part } = trace.meta;
  const colour = shade(arm === null ? OF_NO_ARM[part] || "--ink" : `--arm-${arm % ARMS}`);
  const copy = structuredClone(trace);
  if (trace.fill) copy.fillcolor = colour + "26";
  if (copy.line) copy.line.color = part === "band" ? "rgba(0,0,0,0)" : colour;
  if (copy.marker) copy.marker = { ...copy.marker, color: colour, line: { ...copy.marker.line, color: colour } };
  if (copy.error_x) copy.error_x.color = colour;
  return copy;
}

function layout(figure) {
  const axis = (own) => ({ gridcolor: shade("--grid"), linecolor: shade("--line"), zerolinecolor: shade("--line"),
    fixedrange: true, ...own });
  const shapes = (figure.layout.shapes || []).map((s) => ({ ...s, line: { ...s.line, color: shade("--soft") } }));
  const updatemenus = (figure.layout.updatemenus || []).map((menu) => ({ ...menu, bgcolor: shade("--card"),
    bordercolor: shade("--line") }));
  return { ...figure.layout, shapes, updatemenus, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    dragmode: false, font: { family: style.fontFamily || "sans-serif", size: 12, color: shade("--ink") },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: shade("--soft"), activecolor: shade("--ink") },
    hoverlabel: { bgcolor: shade("--card"), bordercolor: shade("--line"), font: { color: shade("--ink") } },
    xaxis: axis(figure.layout.xaxis), yaxis: axis(figure.layout.yaxis) };
}

function paint() {
  for (const figure of figures) {
    Plotly.react(figure.id, figure.data.map(painted), layout(figure), { displaylogo: false,
      modeBarButtons: [["toImage"]] });
  }
}

// Runs the packed script of the page, Plotly: base64 of its deflated text.
async function run(id) {
  const packed = Uint8Array.from(atob(document.getElementById(id).textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

function draw() {
  paint();
  // Plotly's own `responsive` hears the window alone; a figure can change its width without it.
  const watch = new ResizeObserver((seen) => seen.forEach((entry) => Plotly.Plots.resize(entry.target)));
  figures.forEach((figure) => watch.observe(document.getElementById(figure.id)));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
}

function explain() {
  for (const figure of figures) {
    document.getElementById(figure.id).textContent = "This browser is too old to draw the figure (it has no DecompressionStream).";
  }
}

window.drawn = typeof DecompressionStream === "undefined" ? explain() : run("plotly").then(draw);
