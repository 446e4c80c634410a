"use strict";
for (const figure of document.querySelectorAll("figure.chart")) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const rows = data.lines.flatMap(([name, xs, ys]) => xs.map((x, index) => ({ name, x, y: ys[index] })));
  const events = data.events.map(([x, label]) => ({ x, label }));
  const spec = { ...data.spec, datasets: { rows, events } };
  const options = { actions: false, renderer: "svg", tooltip: { theme: matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light" } };
  vegaEmbed(figure.querySelector(".plot"), spec, options);
}
for (const figure of document.querySelectorAll("figure.film")) {
  const film = JSON.parse(figure.querySelector(":scope > script").textContent);
  const slider = figure.querySelector("input[type=range]");
  const output = figure.querySelector("output");
  const images = [...figure.querySelectorAll("img[data-row]")];
  const show = (index) => {
    for (const image of images) {
      const frames = film.rows[Number(image.dataset.row)];
      image.src = frames[Math.min(index, frames.length - 1)];
    }
    output.textContent = `${film.unit} ${film.steps[index].toLocaleString("en")}`;
  };
  figure.querySelector("select").addEventListener("change", (event) => figure.style.setProperty("--zoom", event.target.value));
  if (!slider) continue;
  const button = figure.querySelector("button.play");
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; button.textContent = "play"; };
  slider.addEventListener("input", () => show(Number(slider.value)));
  slider.addEventListener("pointerdown", stop);
  button.addEventListener("click", () => {
    if (timer !== null) { stop(); return; }
    button.textContent = "stop";
    if (slider.value === slider.max) slider.value = "-1";
    timer = setInterval(() => {
      if (slider.value === slider.max) { stop(); return; }
      slider.value = String(Number(slider.value) + 1);
      show(Number(slider.value));
    }, 500);
  });
}
