// Starts the page once its data are unpacked: the explorer, or the feature pages.

import { render } from "preact";
import { App } from "./app";
import { circuit, ready } from "./data";
import { printedSvg } from "./exports";
import { FeaturePages } from "./features";
import { setUpKeyboard } from "./keyboard";
import { scene } from "./scene";
import { stage } from "./stage";
import * as state from "./state";

ready.then(() => {
  state.start();
  if (circuit.page === "features") {
    render(<FeaturePages />, document.getElementById("app")!);
    document.documentElement.dataset.page = "features";
    document.documentElement.dataset.ready = "true";
    return;
  }
  render(<App />, document.getElementById("app")!);
  setUpKeyboard();
  addEventListener("beforeprint", () => {
    document.getElementById("printed")!.innerHTML = printedSvg(); // every text in it is escaped by the pen
  });
  Object.assign(window, { viewer: { scene, state, stage: () => stage } }); // for tests and the console
  document.documentElement.dataset.ready = "true";
});
