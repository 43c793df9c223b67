"use strict";
// Reading a chart: the values at the step nearest to the pointer. The page is complete without this.
for (const svg of document.querySelectorAll("svg[data-x]")) {
  const [low, high, start, end] = svg.dataset.x.split(" ").map(Number);
  const cursor = svg.querySelector(".cursor");
  const output = svg.closest("figure").querySelector("output");
  let curves = null;
  const read = () => [...svg.querySelectorAll("g[data-points]")].map((group) => ({
    run: group.getAttribute("class").split(" ")[0],
    label: group.dataset.label,
    points: group.dataset.points.split(" ").map((pair) => pair.split(":").map(Number)),
  }));
  const show = (event) => {
    curves ??= read();
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const step = low + ((x - start) / (end - start)) * (high - low);
    const nearest = (points) => points.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a));
    const found = curves.map((curve) => ({ ...curve, point: nearest(curve.points) }));
    const at = nearest(found.map((curve) => curve.point))[0];
    const place = start + ((at - low) / (high - low)) * (end - start);
    cursor.setAttribute("x1", place);
    cursor.setAttribute("x2", place);
    cursor.style.visibility = "visible";
    output.replaceChildren();
    for (const { run, label, point } of found) {
      const value = document.createElement("b");
      value.className = run;
      value.textContent = `${label ? label + " " : ""}${point[1]} `;
      const where = document.createElement("span");
      where.textContent = `at step ${point[0].toLocaleString("en")}  `;
      output.append(value, where);
    }
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", () => {
    cursor.style.visibility = "hidden";
    output.replaceChildren();
  });
}
