// The explorer in a notebook: an anywidget module that puts the page into a frame of its own, so that no style or script
// of the notebook meets it, and keeps what is pinned, labelled and grouped there in step with Python.

const NAMES = { selected: "pins", labels: "labels", groups: "groups" }; // trait -> signal of state.ts
const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);

function render({ model, el }) {
  const frame = document.createElement("iframe");
  frame.title = "Circuit";
  frame.style.cssText = `width:100%;height:${model.get("height")}px;border:1px solid #8884;border-radius:8px`;
  frame.srcdoc = model.get("page");
  const undo = [];
  frame.addEventListener("load", async () => {
    for (let tries = 0; !frame.contentWindow.viewer && tries < 600; tries++) {
      await new Promise((done) => setTimeout(done, 50));
    }
    const { state } = frame.contentWindow.viewer;
    for (const [trait, name] of Object.entries(NAMES)) {
      const take = () => {
        const value = model.get(trait);
        if (!same(value, state[name].value)) state.take(name, value);
      };
      take();
      model.on(`change:${trait}`, take);
      undo.push(() => model.off(`change:${trait}`, take));
      undo.push(
        state[name].subscribe((value) => {
          if (same(value, model.get(trait))) return;
          model.set(trait, JSON.parse(JSON.stringify(value)));
          model.save_changes();
        }),
      );
    }
    el.dataset.ready = "true";
  });
  el.append(frame);
  return () => undo.forEach((step) => step());
}

export default { render };
