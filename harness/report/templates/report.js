"use strict";
// A figure's colours are CSS variables, resolved when it is drawn and when the colour scheme changes.
function coloured(node, styles) {
  if (typeof node === "string") {
    return node.startsWith("var(--") ? styles.getPropertyValue(node.slice(4, -1)).trim() : node;
  }
  if (Array.isArray(node)) return node.map((each) => coloured(each, styles));
  if (node === null || typeof node !== "object") return node;
  return Object.fromEntries(Object.entries(node).map(([key, each]) => [key, coloured(each, styles)]));
}

function draw() {
  const styles = getComputedStyle(document.documentElement);
  const touch = matchMedia("(pointer: coarse)").matches;
  for (const plot of document.querySelectorAll(".plot")) {
    const source = plot.querySelector("script"), canvas = plot.querySelector(".canvas");
    if (!source) continue;
    const { data, layout } = coloured(JSON.parse(source.textContent), styles);
    layout.width = undefined;
    layout.autosize = true;
    if (plot.classList.contains("square")) {
      layout.height = Math.min(canvas.clientWidth, 520);
      // On a phone the class names would leave no room for the matrix; a touch shows them.
      const names = data[0].type !== "heatmap" || canvas.clientWidth > 420;
      for (const axis of [layout.xaxis, layout.yaxis]) axis.showticklabels = names && axis.showticklabels !== false;
    }
    if (touch) layout.dragmode = false; // a finger scrolls the page
    Plotly.react(canvas, data, layout, { responsive: true, displaylogo: false, displayModeBar: false });
  }
}

function sortable(table) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const descending = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((each) => each.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const compare = (one, other) => {
      const [a, b] = [value(one), value(other)];
      if (a === "" || b === "") return (a === "") - (b === ""); // what is missing comes last
      const order = isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
      return descending ? -order : order;
    };
    body.append(...[...body.rows].sort(compare));
  }));
}

draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
document.querySelectorAll("table.sortable").forEach(sortable);
