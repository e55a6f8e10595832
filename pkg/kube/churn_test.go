package kube

import (
	"encoding/json"
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"

	"github.com/warren-cni/warren/pkg/internal/measure"
)

// BenchmarkChurn is the cost of one event of a pod's watch among 5,000 pods: to decode it and nothing else, to take it over
// where it changes only what nobody reads, and where it changes a label and somebody asks for the changes.
func BenchmarkChurn(b *testing.B) {
	scheme, err := newScheme()
	if err != nil {
		b.Fatal(err)
	}
	codecs := serializer.NewCodecFactory(scheme)
	for _, mediaType := range []string{runtime.ContentTypeJSON, runtime.ContentTypeProtobuf} {
		info, ok := runtime.SerializerInfoForMediaType(codecs.SupportedMediaTypes(), mediaType)
		if !ok {
			b.Fatalf("no serializer for %s", mediaType)
		}
		decoder := codecs.DecoderToVersion(info.Serializer, corev1.SchemeGroupVersion)
		encode := func(p *corev1.Pod) []byte {
			data, err := runtime.Encode(codecs.EncoderForVersion(info.Serializer, corev1.SchemeGroupVersion), p)
			if err != nil {
				b.Fatal(err)
			}
			return data
		}
		decode := func(data []byte) *corev1.Pod {
			o, _, err := decoder.Decode(data, nil, nil)
			if err != nil {
				b.Fatal(err)
			}
			return o.(*corev1.Pod)
		}
		name := info.MediaTypeSubType
		for what, kinds := range map[string][2][]byte{
			"irrelevant": {encode(busyPod("7", "web")), encode(busyPod("8", "web"))},
			"relevant":   {encode(busyPod("7", "web")), encode(busyPod("8", "db"))},
		} {
			b.Run(fmt.Sprintf("%s/%s/decoded", name, what), func(b *testing.B) {
				defer measure.PerOperation(b)()
				for i := 0; b.Loop(); i++ {
					decode(kinds[i%2])
				}
			})
			b.Run(fmt.Sprintf("%s/%s/taken", name, what), func(b *testing.B) {
				a := crowded(b)
				defer measure.PerOperation(b)()
				for i := 0; b.Loop(); i++ {
					if err := a.pods.Update(decode(kinds[i%2])); err != nil {
						b.Fatal(err)
					}
					select {
					case <-a.Changed():
						a.Changes()
					default:
					}
				}
			})
		}
	}
}

// crowded returns a source of 5,000 pods, busy ones among them.
func crowded(b *testing.B) *API {
	b.Helper()
	a := offline(b)
	list := []any{busyPod("1", "web")}
	for i := range 5000 {
		list = append(list, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: fmt.Sprint("ns", i%100), Name: fmt.Sprint("p", i)}})
	}
	if err := a.pods.Replace(list, "1"); err != nil {
		b.Fatal(err)
	}
	a.Changes()
	drain(a.Changed())
	return a
}

// busyPod is a pod as a cluster has them: with managed fields, volumes, environment and conditions.
func busyPod(version, app string) *corev1.Pod {
	environment, fields := []corev1.EnvVar{}, map[string]any{}
	for i := range 12 {
		environment = append(environment, corev1.EnvVar{Name: fmt.Sprint("VARIABLE_", i), Value: "some value of usual length"})
		fields[fmt.Sprintf("f:field-%d", i)] = map[string]any{"f:name": map[string]any{}, "f:value": map[string]any{}}
	}
	managed, err := json.Marshal(map[string]any{"f:spec": fields, "f:status": fields})
	if err != nil {
		panic(err)
	}
	return &corev1.Pod{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "shop", Name: "web-5d8c7b9f4-x2x7q", UID: types.UID("0b8e0a2c-5b7e-4f0e-9a55-3d1c9f1a7b11"), ResourceVersion: version,
			Labels:          map[string]string{"app": app, "pod-template-hash": "5d8c7b9f4", "team": "a"},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "web-5d8c7b9f4", UID: "u"}},
			ManagedFields:   []metav1.ManagedFieldsEntry{{Manager: "kube-controller-manager", FieldsV1: metav1.NewFieldsV1(string(managed))}},
		},
		Spec: corev1.PodSpec{
			NodeName: "n2", ServiceAccountName: "default",
			Volumes:    []corev1.Volume{{Name: "kube-api-access", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{}}}},
			Containers: []corev1.Container{{Name: "web", Image: "registry.example.com/shop/web:1.2.3", Env: environment, Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 8080}}}},
		},
		Status: corev1.PodStatus{
			Phase: corev1.PodRunning, PodIP: "10.2.0.9", PodIPs: []corev1.PodIP{{IP: "10.2.0.9"}},
			Conditions: []corev1.PodCondition{
				{Type: corev1.PodScheduled, Status: corev1.ConditionTrue}, {Type: corev1.PodReady, Status: corev1.ConditionTrue, Message: version},
			},
		},
	}
}
