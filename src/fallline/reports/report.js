// What happens in the browser: the charts are drawn in the reader's colours, and code is copied by a button.
(() => {
  "use strict";
  const themes = JSON.parse(document.getElementById("themes").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const print = window.matchMedia("print");
  const views = new Map();

  const draw = async (source) => {
    const place = document.getElementById(source.dataset.for);
    const theme = dark.matches && !print.matches ? "dark" : "light";
    try {
      const drawn = await vegaEmbed(place, JSON.parse(source.textContent), {
        renderer: "svg",
        config: themes[theme],
        tooltip: { theme },
        actions: { export: true, source: false, compiled: false, editor: false },
        downloadFileName: place.id,
      });
      if (views.has(place)) views.get(place).finalize();
      views.set(place, drawn);
      // Only now is the width known, by which the legend breaks into rows: lay the chart out once more.
      await drawn.view.resize().runAsync();
    } catch (error) {
      place.textContent = `This chart could not be drawn: ${error.message}`;
    }
  };
  const drawAll = () => document.querySelectorAll(".chart-spec").forEach(draw);
  drawAll();
  dark.addEventListener("change", drawAll);
  print.addEventListener("change", drawAll);

  const copied = async (code) => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      return true;
    } catch {
      // Browsers keep the clipboard from pages opened as a file: select the code and copy the selection.
      const selection = window.getSelection();
      selection.selectAllChildren(code);
      return document.execCommand("copy");
    }
  };
  document.querySelectorAll("button.copy").forEach((button) => {
    button.hidden = false;
    button.addEventListener("click", async () => {
      const done = await copied(button.parentElement.querySelector("code"));
      button.textContent = done ? "Copied" : "Press Ctrl-C";
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
  });
})();
