// Dragging over a chart of hours sets the time range of the page: `data-brush` is the begin of the first hour,
// `data-hours` their number.
const HOUR = 3_600_000;
let isWatching = false;

export function watch(root) {
  if (isWatching) return;
  isWatching = true;
  document.addEventListener("pointerdown", (event) => {
    const chart = event.target.closest("[data-brush]");
    if (!chart || event.button !== 0) return;
    event.preventDefault();
    const box = chart.getBoundingClientRect();
    const count = Number(chart.dataset.hours);
    const hourAt = (x) => Math.min(Math.max(Math.floor(((x - box.left) / box.width) * count), 0), count - 1);
    const from = hourAt(event.clientX);
    const shade = chart.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "rect"));
    const wide = chart.viewBox.baseVal.width / count;
    let to = from;
    const draw = () => {
      shade.setAttribute("class", "brush");
      shade.setAttribute("x", Math.min(from, to) * wide);
      shade.setAttribute("width", (Math.abs(to - from) + 1) * wide);
      shade.setAttribute("height", "100%");
    };
    const move = (moved) => { to = hourAt(moved.clientX); draw(); };
    const end = new AbortController();
    draw();
    document.addEventListener("pointermove", move, { signal: end.signal });
    document.addEventListener("pointercancel", () => { end.abort(); shade.remove(); }, { signal: end.signal });
    document.addEventListener("pointerup", (last) => {
      end.abort();
      move(last);
      const begin = Date.parse(chart.dataset.brush);
      const at = (hour) => new Date(begin + hour * HOUR).toISOString();
      const query = new URLSearchParams({ since: at(Math.min(from, to)), until: at(Math.max(from, to) + 1) });
      location.assign(`${root}/dashboard/overview?${query}`);
    }, { signal: end.signal });
  });
}
