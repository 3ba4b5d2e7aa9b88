// Embedding plots: the choice of a view moves the points, the choice of an action makes the others faint.
(() => {
  "use strict";

  function start(figure) {
    const views = JSON.parse(figure.querySelector("script").textContent);
    const [circles, words] = ["circle", "text"].map((tag) => [...figure.querySelectorAll(tag)]);
    const marked = [...figure.querySelectorAll("[data-action]")];
    const [view, action] = ["view", "action"].map((name) => figure.querySelector(`[data-control=${name}]`));

    function place(elements, names, places) {
      elements.forEach((element, number) => names.forEach((name, axis) =>
        element.setAttribute(name, places[2 * number + axis])));
    }

    view?.addEventListener("change", () => {
      place(circles, ["cx", "cy"], views[view.value].points);
      place(words, ["x", "y"], views[view.value].labels);
    });
    action?.addEventListener("change", () => {
      for (const part of marked) {
        part.classList.toggle("dim", action.value !== "" && part.dataset.action !== action.value);
      }
    });
    for (const controls of figure.querySelectorAll(".controls")) controls.hidden = false;
  }

  document.querySelectorAll(".embedding").forEach(start);
})();
